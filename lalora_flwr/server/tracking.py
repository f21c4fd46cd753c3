"""The trackers of a run: each is told of the run by a thread of its own, so that none can hold it up, end it or change it."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.files import PUBLIC, replace_file
from lalora_flwr.server.metrics import RoundMetrics, Summary
from lalora_flwr.server.trackers.tracker import Tracker
from lalora_flwr.settings import Settings
from lalora_flwr.settings.choices import TRACKERS

log = logging.getLogger("lalora_flwr.server")
LIBRARIES = ("tensorboard", "wandb", "mlflow")  # of our trackers, which have the same names
INSTALL = 'pip install "lalora-flwr[tracking]"'
NOTE = "tracking.json"  # in the run's folder: the last round that each tracker was told, and why one was dropped
PATIENCE = 120.0  # seconds at the end of a run for what trackers still have to send
STOPPED_PATIENCE = 10.0  # the same where the run stopped, and somebody may wait for its process to end
LONGEST = 200  # letters of a reason


def check_trackers(settings: Settings, installed: Callable[[str], bool] = lambda name: find_spec(name) is not None) -> None:
    """Refuse trackers that are not there, without importing their libraries.

    Args:
        settings: of a run.
        installed: whether a package can be imported.

    Raises:
        ConfigError: an unknown name, or a library that is not installed.
    """
    for name in settings.trackers:
        if name in LIBRARIES:
            if not installed(name):
                raise ConfigError(f"track = {name!r}: {name} is not installed; {INSTALL}")
        elif name not in TRACKERS:
            raise ConfigError(f"track = {name!r}: must be one of {TRACKERS.suggest(name)}")


def trackers_of(settings: Settings) -> dict[str, Tracker]:
    """The trackers that a run names, none of them started; their libraries are imported.

    Raises:
        ConfigError: as `check_trackers`, or one of them is no tracker.
    """
    check_trackers(settings)
    found: dict[str, Tracker] = {}
    for name in settings.trackers:
        try:
            made = TRACKERS.get(name, type)()
        except ConfigError:
            raise
        except Exception as error:  # an import, or the constructor of a package that nobody here knows
            hint = f"; {INSTALL}" if name in LIBRARIES else ""
            raise ConfigError(f"track = {name!r}: cannot be made: {_reason(error)}{hint}") from None
        if not isinstance(made, Tracker):
            raise ConfigError(f"track = {name!r}: a tracker has start, round and finish")
        found[name] = made
    return found


class Tracking:
    """All trackers of a run."""

    def __init__(self, trackers: Mapping[str, Tracker], settings: Settings, folder: Path, patience: float = PATIENCE) -> None:
        """Start them.

        Args:
            trackers: by name.
            settings, folder: of the run.
            patience: seconds to wait for them at the end.
        """
        self._note, self._patience = _Note(folder / NOTE), patience
        self._told = {name: self._note.begin(name) for name in trackers}
        self._threads = {name: _Thread(name, self._note) for name in trackers}
        self._trackers = trackers
        for name, tracker in trackers.items():
            self._threads[name].tell(lambda tracker=tracker: tracker.start(settings, folder))  # type: ignore[misc]

    def rounds(self, lines: Iterable[RoundMetrics]) -> None:
        """Tell each of the rounds that it does not know."""
        for line in lines:
            for name, tracker in self._trackers.items():
                if line.round > self._told[name]:
                    self._told[name] = line.round
                    self._threads[name].tell(lambda tracker=tracker, line=line: tracker.round(line), line.round)  # type: ignore[misc]

    def finish(self, summary: Summary | None) -> None:
        """Tell them how the run ended, and wait for them, though not forever; less for those of a run that stopped."""
        for name, tracker in self._trackers.items():
            self._threads[name].tell(lambda tracker=tracker: tracker.finish(summary))  # type: ignore[misc]
        deadline = time.monotonic() + (self._patience if summary else min(self._patience, STOPPED_PATIENCE))
        for thread in self._threads.values():
            thread.end(deadline)


class _Note:
    """What ``tracking.json`` holds. It is for the next attempt and for people: a note that cannot be written costs no run."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._content: dict[str, dict[str, object]] = {}
        with suppress(OSError, ValueError):
            self._content = {name: dict(own) for name, own in json.loads(path.read_text(encoding="utf-8")).items()}

    def begin(self, name: str) -> int:
        """The last round that a tracker was told before this attempt; it is no longer dropped."""
        found = self._content.get(name, {})
        found.pop("dropped", None)
        told = found.get("round", 0)
        return told if isinstance(told, int) else 0

    def put(self, name: str, key: str, value: object) -> None:
        with self._lock:
            self._content.setdefault(name, {})[key] = value
            with suppress(OSError):
                replace_file(self._path, json.dumps(self._content) + "\n", mode=PUBLIC)


class _Thread:
    """Tells one tracker one thing after the other, until it fails for the first time."""

    def __init__(self, name: str, note: _Note) -> None:
        self._name, self._note, self._dropped = name, note, threading.Event()
        self._tasks: SimpleQueue[tuple[Callable[[], None], int] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def tell(self, task: Callable[[], None], server_round: int = 0) -> None:
        """``server_round``: which the tracker knows when the task is done; 0: it is about no round."""
        self._tasks.put((task, server_round))

    def end(self, deadline: float) -> None:
        """Wait for what is left to tell, until a time of the monotonic clock."""
        self._tasks.put(None)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._drop("it did not come to an end")

    def _work(self) -> None:
        try:
            for task, server_round in iter(self._tasks.get, None):
                if self._dropped.is_set():
                    return
                task()
                if server_round:
                    self._note.put(self._name, "round", server_round)
        except BaseException as error:  # also a library's sys.exit, which ends this thread alone
            self._drop(_reason(error))

    def _drop(self, reason: str) -> None:
        self._dropped.set()
        log.warning("tracker %s: %s; the run goes on without it", self._name, reason)
        self._note.put(self._name, "dropped", reason)


def _reason(error: BaseException) -> str:
    """In one line of bounded length."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:LONGEST].rstrip(": ")


def dropped(folder: Path) -> dict[str, str]:
    """The trackers that a run went on without, and why."""
    with suppress(OSError, ValueError, AttributeError):
        content = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        return {name: str(own["dropped"]) for name, own in content.items() if "dropped" in own}
    return {}
