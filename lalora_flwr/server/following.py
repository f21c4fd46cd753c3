"""All who follow a run on the server: its caller, its trackers, and the operator's metrics file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from lalora_flwr.server.metrics import OnRound, RoundMetrics, Summary
from lalora_flwr.server.monitoring import FINISHED, RUNNING, STOPPED, MetricsFile
from lalora_flwr.server.trackers.tracker import Tracker
from lalora_flwr.server.tracking import Tracking
from lalora_flwr.settings import Settings


class Followers:
    """Told of the run as it goes, after the same was written to its folder; a context that ends with the run.

    Guarantee: trackers are given what lies in the folder: settings, `RoundMetrics` and `Summary`. The metrics file, which stays
    with the operator, also says when each site last served a round.
    """

    def __init__(self, settings: Settings, folder: Path, trackers: Mapping[str, Tracker], on_round: OnRound | None) -> None:
        """
        Args:
            settings, folder: of the run.
            trackers: by name.
            on_round: the caller's; what it raises ends the run.
        """
        self._tracking, self._file = Tracking(trackers, settings, folder), MetricsFile(settings)
        self._on_round, self._over = on_round, False

    def __enter__(self) -> Followers:
        self._file.write(RUNNING)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._over:
            self._end(None)

    def resumed(self, lines: Sequence[RoundMetrics]) -> None:
        """The rounds of the attempts before: a tracker gets those that it missed."""
        self._file.add(lines)
        self._tracking.rounds(lines)

    def round(self, line: RoundMetrics, served: Sequence[int]) -> None:
        """A finished round, and the numbers of the sites that served it."""
        self._file.add([line], served)
        self._tracking.rounds([line])
        if self._on_round:
            self._on_round(line)

    def finish(self, summary: Summary) -> None:
        """The run has its result."""
        self._end(summary)

    def _end(self, summary: Summary | None) -> None:
        self._over = True
        self._file.write(FINISHED if summary else STOPPED)
        self._tracking.finish(summary)
