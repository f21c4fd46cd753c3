"""CPU-seconds and seconds of the rounds of a run, over all of its processes."""

from __future__ import annotations

import itertools
import os
import resource
import statistics
import time
from collections.abc import Sequence
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
    """The clocks at the end of each round."""

    def __init__(self, rounds: int, root: int = 0, *, late: bool = False) -> None:
        """
        Args:
            rounds: how many there are to be; three or more for `numbers`.
            root: as `cpu_seconds` has it.
            late: rounds are seen some time after they end, several at once.
        """
        self._rounds, self._root, self._late = rounds, root, late
        self._lost_cpu = self._lost = 0.0  # by looking at the clocks
        self.at: list[tuple[float, float]] = []

    def __call__(self) -> None:
        cpu, now = time.process_time(), time.time()
        self.at.append((cpu_seconds(self._root) - self._lost_cpu, now - self._lost))
        self._lost_cpu += time.process_time() - cpu
        self._lost += time.time() - now

    @property
    def ended(self) -> bool:
        return len(self.at) == self._rounds

    def numbers(self) -> Numbers:
        """CPU-seconds and seconds of a round in the later half, and seconds from the process's start to the first round's end.

        Not of the last round, in which ours evaluates. Of the others the lower quartile, since other work of the machine only
        ever slows a round; where rounds are seen late, their mean.
        """
        later = self.at[max(1, self._rounds // 2) - 1 : self._rounds - 1]
        typical = _mean_step if self._late else _quick_step
        cpu, wall = (typical([clocks[which] for clocks in later]) for which in (0, 1))
        return {"cpu": cpu, "wall": wall, "start": self.at[0][1] - float(os.environ[BEGUN])}


def _mean_step(clocks: Sequence[float]) -> float:
    return (clocks[-1] - clocks[0]) / (len(clocks) - 1)


def _quick_step(clocks: Sequence[float]) -> float:
    steps = [after - before for before, after in itertools.pairwise(clocks)]
    return statistics.quantiles(steps, n=4, method="inclusive")[0] if len(steps) > 1 else steps[0]
