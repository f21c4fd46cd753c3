"""Errors whose text is one line that tells the user what to do."""


class LaloraError(Exception):
    """Something the user can mend; printed as one line, without a traceback."""


class ConfigError(LaloraError):
    """A run-config key or value that cannot be used."""


class RunFailed(LaloraError):
    """A run that stopped before it wrote its summary."""


class NoSiteLeft(RunFailed):
    """No site may serve another round: all have served those that their noise is calibrated for, or left."""


class SiteSilent(RunFailed):
    """A site did not say its number; it may if it is asked again."""


class WorkerDied(RunFailed):
    """A process that simulates sites died; Flower would go on handing it messages, so the run has to be started anew."""


class Interrupted(LaloraError):
    """The user stopped a run."""


class SiteRefusal(LaloraError):
    """A reason a site may give the server: a fixed text that holds nothing of the site's data."""


BUDGET = "budget: "  # how the reason begins with which a site leaves a run
SUBJECTS = frozenset(  # what a site's reasons begin with, before the colon
    {"adapter", "budget", "cap", "configuration", "data", "dataset", "evaluation", "failure", "ledger", "node-config", "order"}
    | {"profile", "sharing"}
)


def subject_of(reason: str) -> str:
    """What a reason is about, one of a few words whatever a site sends: ``other`` if it is none of the package's own."""
    subject, colon, _ = reason.partition(":")
    return subject if colon and subject in SUBJECTS else "other"


class BudgetExhausted(SiteRefusal):
    """The site has no privacy budget left for the steps it was asked for; the reason begins with `BUDGET`."""


class LedgerError(LaloraError):
    """A site's ledger cannot be used or was tampered with. The text is for the ledger's owner and never leaves the site."""
