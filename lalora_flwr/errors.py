"""Errors whose text is one line that tells the user what to do."""


class LaloraError(Exception):
    """Something the user can mend; printed as one line, without a traceback."""


class ConfigError(LaloraError):
    """A run-config key or value that cannot be used."""


class RunFailed(LaloraError):
    """A run that stopped before it wrote its summary."""


class Interrupted(LaloraError):
    """The user stopped a run."""


class SiteRefusal(LaloraError):
    """A reason a site may give the server: a fixed text that holds nothing of the site's data."""


class BudgetExhausted(SiteRefusal):
    """The site has no privacy budget left for the step it was asked for."""
