"""The last word of a run whose process is told to end: by ``flwr stop``, by a signal, or because the SuperLink died.

Flower's server process watches the one that started it. When that one is gone it calls its exit handlers and, five seconds
later, ends wherever it is: its own handlers wait for a SuperLink that no longer answers, and no exception reaches the run.
So the run's folder is told by an exit handler too, which Flower calls first because it was added last.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lalora_flwr.server.folder import RunFolder

GO_ON = "resume = true (or lalora run --resume) goes on after the last finished round"
STOPPED = f"the run was stopped, by flwr stop or a signal to its process; {GO_ON}"
ORPHANED = f"the SuperLink ended in the middle of the run, or the command that it belongs to; start it again, and {GO_ON}"


@contextmanager
def last_word(folder: RunFolder, at_exit: Callable[[Callable[[], None]], None]) -> Iterator[None]:
    """While the context lasts, the end of the process writes ``failure.json``, unless the folder holds a result already.

    Args:
        folder: of the run.
        at_exit: registers a function that the process calls when it is told to end, in whatever thread.
    """
    started_by, over = os.getppid(), False

    def say() -> None:
        if not over and not folder.ended:
            folder.fail(STOPPED if os.getppid() == started_by else ORPHANED)

    at_exit(say)
    try:
        yield
    finally:
        over = True
