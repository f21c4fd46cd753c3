"""What a tracker is, and what ours have in common."""

from __future__ import annotations

import math
import secrets
from pathlib import Path
from typing import Protocol, runtime_checkable

from lalora_flwr.ground.files import PUBLIC, replace_file
from lalora_flwr.server.metrics import RoundMetrics, Summary
from lalora_flwr.settings import KEYS, Kind, Settings, Value, flatten

PROJECT = "lalora-flwr"  # under which runs are kept unless the library's own variable names another


@runtime_checkable
class Tracker(Protocol):
    """Follows a run. A class without arguments to its constructor, under an entry point of ``lalora.trackers``.

    It gets what the server writes to the run's folder, and nothing else. All calls come from one thread of its own, in order.
    What it raises ends the tracker and not the run.
    """

    def start(self, settings: Settings, folder: Path) -> None:
        """The run begins, or goes on with ``settings.resume``.

        Args:
            settings: of the run.
            folder: of the run; a tracker may keep files of its own in it.
        """

    def round(self, metrics: RoundMetrics) -> None:
        """A round was finished. After a resume the rounds go on where the tracker stopped."""

    def finish(self, summary: Summary | None) -> None:
        """The run was finished; None: it stopped, and may be resumed."""


def config_of(settings: Settings) -> dict[str, Value]:
    """The run's keys without those that only say where things are; infinity as a text, since JSON has no word for it."""
    flat = {name: value for name, value in flatten(settings).items() if KEYS[name].kind is not Kind.PLACE}
    return {name: str(value) if isinstance(value, float) and not math.isfinite(value) else value for name, value in flat.items()}


def finite(record: RoundMetrics | Summary) -> dict[str, float]:
    """The finite numbers of a record, by name; the round itself is not among them."""
    return {name: value for name, value in record.numbers().items() if value is not None and name != "round"}


def kept_id(path: Path) -> str:
    """A random name that a tracker gives a run, the same after a resume.

    Args:
        path: the file that keeps it; its folder is made.
    """
    if path.is_file():
        return path.read_text(encoding="utf-8").strip()
    made = secrets.token_hex(8)
    keep(path, made)
    return made


def keep(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    replace_file(path, text + "\n", mode=PUBLIC)
