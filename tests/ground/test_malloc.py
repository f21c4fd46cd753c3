from __future__ import annotations

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys, threading
import torch
from lalora_flwr.ground.malloc import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory() and keep_freed_memory()


def step():
    held = [torch.ones(1 << 17) for _ in range(90)]


def steps():
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(10):
        step()
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)


worker = threading.Thread(target=steps)
worker.start()
worker.join()
"""


def faults(how: str) -> int:
    return int(subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_a_step_finds_the_memory_of_the_last() -> None:
    few = 90 * 2**19 // 4096 // 10  # a tenth of one step's pages
    assert faults("kept") < few < faults("as it is")  # in ten steps
