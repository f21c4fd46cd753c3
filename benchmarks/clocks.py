"""CPU-seconds and seconds of the rounds of a run, over all of its processes."""

from __future__ import annotations

import os
import resource
import time
from contextlib import suppress

import psutil

BEGUN = "LALORA_BENCHMARK_BEGUN"  # in the environment: when the process was started
Numbers = dict[str, float]


def cpu_seconds(root: int = 0) -> float:
    """Of a process and all below it, those that ended included; ``root``: its id; 0: this one, whose own clock is finer."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = 0.0 if root else time.process_time() + ended.ru_utime + ended.ru_stime
    top = psutil.Process(root or os.getpid())
    for process in ([top] if root else []) + top.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            spent += times.user + times.system + times.children_user + times.children_system
    return spent


class Marks:
    """Clocks at the ends of the first round, of half of the rounds, and of the last but one: our last round evaluates."""

    def __init__(self, rounds: int, root: int = 0) -> None:
        """``root``: as `cpu_seconds` has it."""
        self._rounds, self._half, self._last = rounds, max(1, rounds // 2), max(1, rounds - 1)
        self._seen, self._root = 0, root
        self.at: dict[int, tuple[float, float]] = {}

    def __call__(self) -> None:
        self._seen += 1
        if self._seen in (1, self._half, self._last):
            self.at[self._seen] = (cpu_seconds(self._root), time.time())

    @property
    def ended(self) -> bool:
        return self._seen == self._rounds

    def numbers(self) -> Numbers:
        """CPU-seconds and seconds of a round in the later half, and seconds from the process's start to the first round's end."""
        half, last = self.at[self._half], self.at[self._last]
        rounds = max(1, self._last - self._half)
        start = self.at[1][1] - float(os.environ[BEGUN])
        return {"cpu": (last[0] - half[0]) / rounds, "wall": (last[1] - half[1]) / rounds, "start": start}
