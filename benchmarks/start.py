"""How long a run takes to its first round, and what that costs: ``lalora run`` with the default job, on Ray and inline.

    python -m benchmarks.start                            three runs of each engine, in turns; about three minutes
    python -m benchmarks.start --against ../older/.venv/bin/lalora     and of another installation, each in turn with this one

``first`` is wall time from the command to the first round's line, ``all`` to the end of a run of two rounds, ``cpu`` the
CPU-seconds of all processes up to the first round. Other work on the machine lengthens all three: the fastest of the runs
counts, and the other installation's are made at the same time.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.machine import processor

LOOK = 0.05  # seconds between two looks at what the processes have used


@dataclass(frozen=True)
class Start:
    """Seconds of one run."""

    first: float
    all: float
    cpu: float


class Used:
    """CPU-seconds of a process and of all that it started, also of those that are gone."""

    def __init__(self, pid: int) -> None:
        self._pid, self._used = pid, dict[int, float]()
        self._over = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while not self._over.wait(LOOK):
            with suppress(psutil.Error):
                process = psutil.Process(self._pid)
                for member in [process, *process.children(recursive=True)]:
                    with suppress(psutil.Error):
                        times = member.cpu_times()
                        self._used[member.pid] = times.user + times.system

    def so_far(self) -> float:
        return sum(list(self._used.values()))

    def stop(self) -> None:
        self._over.set()


def start(lalora: str, engine: str) -> Start:
    """One run of two rounds."""
    with tempfile.TemporaryDirectory() as folder:
        begun, first, cpu = time.monotonic(), 0.0, 0.0
        process = subprocess.Popen(
            [lalora, "run", "--engine", engine, "-c", "num-rounds=2 run-name=run"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        used = Used(process.pid)
        assert process.stdout is not None
        for line in process.stdout:
            if not first and re.match(r"\s+1/2\s", line):
                first, cpu = time.monotonic() - begun, used.so_far()
        used.stop()
        if process.wait():
            sys.exit(f"{lalora} run --engine {engine}: exit status {process.returncode}")
        return Start(first, time.monotonic() - begun, cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to the first round.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", default="", help="the lalora command of another installation")
    arguments = parser.parse_args()
    commands = {"this": str(Path(sys.executable).with_name("lalora"))}
    if arguments.against:
        commands["the other"] = arguments.against
    found: dict[tuple[str, str], list[Start]] = {}
    print(processor())
    print("engine  installation   first     all     cpu")
    for _ in range(arguments.repeats):
        for engine in ("ray", "inline"):
            for name, command in commands.items():
                one = start(command, engine)
                found.setdefault((engine, name), []).append(one)
                print(f"{engine:<7} {name:<12} {one.first:7.1f} {one.all:7.1f} {one.cpu:7.1f}", flush=True)
    for (engine, name), runs in found.items():
        best = Start(min(r.first for r in runs), min(r.all for r in runs), min(r.cpu for r in runs))
        print(f"fastest: {engine} {name}: first {best.first:.1f} s, all {best.all:.1f} s, {best.cpu:.1f} CPU-s")


if __name__ == "__main__":
    main()
