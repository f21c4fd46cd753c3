"""What the operator of a server can watch: a run's progress as a file for Prometheus (``metrics-file``)."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from lalora_flwr.ground.errors import BUDGET, ConfigError, subject_of
from lalora_flwr.ground.files import expanded
from lalora_flwr.ground.prometheus import Family, labels, write_metrics
from lalora_flwr.server.metrics import RoundMetrics
from lalora_flwr.settings import Settings

log = logging.getLogger("lalora_flwr.server")
RUNNING, FINISHED, STOPPED = "running", "finished", "stopped"


class MetricsFile:
    """Keeps the file up to date.

    All but the times of contact follows from the lines of ``metrics.jsonl``, so that a resume loses nothing.

    The reasons of sites are counted by what they are about, a few words; what sites send never makes a label.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        """
        Args:
            settings: of the run; the file is their ``metrics-file``, none if it is empty.
            clock: seconds since 1970.
        """
        self._settings, self._clock = settings, clock
        self._lines: list[RoundMetrics] = []
        self._contact: dict[int, float] = {}  # site -> when it last served a round, in this attempt
        self._warned = False

    def add(self, lines: Iterable[RoundMetrics], served: Sequence[int] = ()) -> None:
        """Rounds that were finished, and the sites that just served the last of them."""
        self._lines += lines
        self._contact |= dict.fromkeys(served, self._clock())
        self.write(RUNNING)

    def write(self, state: str) -> None:
        """Write the file; where that fails nothing but a warning comes of it, once."""
        if not self._settings.metrics_file:
            return
        try:
            write_metrics(expanded(self._settings.metrics_file), self._families(state))
        except (OSError, ValueError, ConfigError) as error:
            if not self._warned:
                reason = error.strerror if isinstance(error, OSError) else error
                log.warning("metrics-file = %r: cannot be written (%s); the run goes on", self._settings.metrics_file, reason)
            self._warned = True

    def _families(self, state: str) -> list[Family]:
        settings, lines = self._settings, self._lines
        last = lines[-1] if lines else None
        run, spent = labels(run=settings.run_name), last.epsilon if last else 0.0
        private = settings.private and (last is None or last.private)
        refusals: Counter[str] = Counter()
        for line in lines:
            refusals.update(subject_of(reason) for reason in line.failed_sites.values())
            refusals[BUDGET.strip(": ")] += len(line.left_sites)
        return [
            Family("lalora_run_state", "What the run does.", {labels(run=settings.run_name, state=state): 1}),
            Family("lalora_run_rounds_wanted", "Rounds that the run wants.", {run: settings.num_rounds}),
            Family("lalora_run_rounds_total", "Rounds that were finished.", {run: last.round if last else 0}),
            Family("lalora_run_epsilon_spent", "Largest epsilon over the sites.", {run: spent if private else None}),
            Family(
                "lalora_run_epsilon_left",
                "What the run's epsilon leaves.",
                {run: max(0.0, settings.privacy.epsilon - spent) if private else None},
            ),
            Family("lalora_run_sites", "Sites that served the last round.", {run: last.sites if last else None}),
            Family(
                "lalora_run_refusals_total",
                "Answers of sites that were no update, by what their reason is about.",
                {labels(run=settings.run_name, reason=reason): count for reason, count in sorted(refusals.items()) if count},
            ),
            Family("lalora_run_seconds_total", "Time of all rounds.", {run: round(sum(line.seconds for line in lines), 3)}),
            Family("lalora_run_round_seconds", "Time of the last round.", {run: last.seconds if last else None}),
            Family("lalora_run_score", "Headline metric of the last round.", {run: last.score if last else None}),
            Family(
                "lalora_run_site_last_contact_timestamp_seconds",
                "When a site last served a round.",
                {labels(run=settings.run_name, site=site): when for site, when in sorted(self._contact.items())},
            ),
            Family("lalora_run_updated_timestamp_seconds", "When this file was written.", {run: self._clock()}),
        ]
