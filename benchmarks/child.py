"""A process that runs one variant of the job, and what its parent reads of it.

    python -m benchmarks.child VARIANT JOB [STATE]

prints its numbers as JSON, or leaves the final adapter in the file STATE.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from threading import Thread

import psutil

from benchmarks.clocks import BEGUN, Marks, Numbers

VARIANTS = {  # what runs the job, by name
    "bare": "benchmarks.loops:bare",
    "bare, spread": "benchmarks.loops:bare_spread",
    "inline": "benchmarks.loops:inline",
    "one by one": "benchmarks.loops:one_by_one",
    "ray": "benchmarks.loops:ray",
    "opacus": "benchmarks.loops:opacus",
    "textbook": "benchmarks.peers.textbook:run",
    "textbook, model kept": "benchmarks.peers.textbook:run_kept",
    "pfl": "benchmarks.peers.pfl_research:run",
    "fluke": "benchmarks.peers.fluke_fl:run",
    "blazefl": "benchmarks.peers.blaze_fl:run",
    "nvflare": "benchmarks.peers.nvidia_flare:run",
}
SPREAD = ("bare, spread", "ray")  # over a worker a processor, whose clocks are coarse
PEERS = ("pfl", "fluke", "blazefl", "nvflare")  # each needs an environment of its own
LOOK_EVERY = 1.0  # seconds between looks at the memory of all processes


def main() -> None:
    variant, text, *state = sys.argv[1:]
    import torch

    from benchmarks.job import Job

    torch.set_num_threads(1)
    job = Job.of(text)
    module, function = VARIANTS[variant].split(":")
    marks = Marks(job.rounds, late=variant in SPREAD)
    left = getattr(importlib.import_module(module), function)(job, marks)
    if state:
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in left.items()}, state[0])
    print("\n" + json.dumps({} if state else marks.numbers()))


class Failed(Exception):
    """A variant ended without its numbers."""


def measured(variant: str, text: str, pythons: Mapping[str, str], state: str = "") -> Numbers:
    """The numbers of a process of its own, with ``memory``: the most MB that it and all below it had together.

    Args:
        variant: a name of `VARIANTS`.
        text: the job's.
        pythons: of peers with an environment of their own, by variant.
        state: a file for the final adapter.

    Raises:
        Failed: with the last line that it said.
    """
    command = [pythons.get(variant, sys.executable), "-W", "ignore", "-m", "benchmarks.child", variant, text]
    env = {**os.environ, BEGUN: str(time.time()), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    most = 0.0
    with subprocess.Popen(
        command + ([state] if state else []), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        said: list[str] = []
        reader = Thread(target=lambda: said.extend(process.stdout or ()))
        reader.start()
        while reader.is_alive():
            most = max(most, _memory(process.pid))
            reader.join(LOOK_EVERY)
    if process.returncode:
        raise Failed(f"{variant}: {(said or ['nothing'])[-1].strip()}")
    found: Numbers = json.loads(next(line for line in reversed(said) if line.startswith("{")))
    return {**found, "memory": most}


def _memory(pid: int) -> float:
    """MB of a process and all below it, shared pages counted once."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_full_info().pss
    return total / 2**20


if __name__ == "__main__":
    main()
