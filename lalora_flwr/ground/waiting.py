"""What a command says while there is nothing to say: on a terminal it moves, elsewhere a line comes now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

FIRST, GROWTH, MOST = 5.0, 2.0, 60.0  # seconds until the first line, how much longer each next one takes, and the longest
Until = Callable[[float], bool]  # waits so many seconds; whether there is something new to say, or an end


class Waiting:
    """Work that takes a while, as a context. ``total`` steps get a bar with the time that is left; 0: nobody knows how many.

    On a terminal a line moves at the bottom, with the time that has passed. Elsewhere a line goes to ``stream`` after five
    seconds without one, then after ten, and so on up to a minute, so that nobody takes a log for that of a process that
    hangs. A quiet console gets neither.
    """

    def __init__(self, console: Console, words: str, total: int = 0, *, stream: TextIO | None = None) -> None:
        self._console, self._words, self._total, self._stream = console, words, total, stream
        self._begun = time.monotonic()
        self._news, self._over = threading.Event(), False
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False))
        counted = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(compact=True)) if total else ()
        self._bar = Bar(*columns, *counted, TimeElapsedColumn(), console=console, transient=True)
        self._task = self._bar.add_task(words, total=total or None)
        self._teller = threading.Thread(target=lambda: self.tell(self._news.wait), daemon=True)

    def __enter__(self) -> Waiting:
        if self._console.is_terminal:
            self._bar.start()
        elif not self._console.quiet:
            self._teller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._news.set()
        if self._console.is_terminal:
            self._bar.stop()

    def now(self, words: str, done: int = 0) -> None:
        """From here on it does this, and ``done`` steps are done."""
        self._words, self._begun = words, time.monotonic()
        self._bar.update(self._task, description=words, completed=done)
        self._news.set()

    def tell(self, wait: Until) -> None:
        """Write lines until the end."""
        pause = FIRST
        while not self._over:
            if wait(pause):
                self._news.clear()
                pause = FIRST
            else:
                pause = min(GROWTH * pause, MOST)
                print(
                    f"{self._words}: {time.monotonic() - self._begun:.0f} s so far", file=self._stream or sys.stderr, flush=True
                )
