"""What accounting costs: ε of a step count, calibration, and one more (σ, q) in a ledger that holds many.

    python -m benchmarks.accounting [--before]

Prints CPU seconds of this process. ``--before`` also times Opacus' PRV accountant, which was the headline before; that
takes minutes. Each line of the ledger's part runs in a process of its own, as a site's messages do.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.machine import processor
from lalora_flwr.privacy.accounting import epsilon_spent, noise_multiplier_for
from lalora_flwr.privacy.composition.composer import Composer
from lalora_flwr.privacy.events import SampledGaussian

DELTA = 1e-5
SIZES = [500 + 37 * i for i in range(100)]  # records of a hundred sites
BATCH = 40
PAIRS = 100


def cpu(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def history(pairs: int) -> list[SampledGaussian]:
    """Many different (σ, q), as a server that likes trouble would ask for them."""
    draw = random.Random(0)
    return [(draw.uniform(0.8, 8), draw.uniform(0.001, 0.2), draw.randrange(10, 100)) for _ in range(pairs)]


def line(what: str, seconds: float) -> None:
    print(f"{what:<72} {seconds * 1e3:12.3f} ms")


def one_pair(accountant: str, counts: int, calibrations: int) -> None:
    epsilon_spent([(1.1, 0.02, 1)], DELTA, accountant)  # imports
    line(f"{accountant}: ε of 300 steps, first time", cpu(lambda: epsilon_spent([(1.2, 0.05, 300)], DELTA, accountant)))
    line(f"{accountant}: the same again", cpu(lambda: epsilon_spent([(1.2, 0.05, 300)], DELTA, accountant)))
    seconds = cpu(lambda: [epsilon_spent([(1.1, 0.02, steps)], DELTA, accountant) for steps in range(1, counts + 1)])
    line(f"{accountant}: each of {counts} step counts of one (σ, q)", seconds / counts)
    some = SIZES[:: len(SIZES) // calibrations]
    for epsilon, steps in ((3.0, 300), (1.0, 3000)):
        seconds = cpu(lambda e=epsilon, n=steps: [noise_multiplier_for(e, DELTA, BATCH / s, n, accountant) for s in some])
        line(f"{accountant}: calibrating {len(some)} sizes, ε = {epsilon:g}, {steps} steps, in all", seconds)


def in_a_new_process(folder: str, pairs: int) -> float:
    command = [sys.executable, "-m", "benchmarks.accounting", "--compose", folder, "--pairs", str(pairs)]
    return float(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def ledger() -> None:
    with tempfile.TemporaryDirectory() as folder:
        line(f"pld: {PAIRS} pairs, new process, empty folder", in_a_new_process(folder, PAIRS))
        line(f"pld: pair {PAIRS + 1}, new process", in_a_new_process(folder, PAIRS + 1))
        line(f"pld: the {PAIRS + 1} pairs again, new process", in_a_new_process(folder, PAIRS + 1))
        costs = [in_a_new_process(folder, pairs) for pairs in range(PAIRS + 2, PAIRS + 22)]
        line("pld: the next 20 pairs, each in a new process, mean", sum(costs) / len(costs))
        line("pld: the next 20 pairs, the dearest", max(costs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", action="store_true", help="also Opacus' PRV accountant")
    parser.add_argument("--compose", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compose:
        compose = Composer(Path(arguments.compose))
        print(json.dumps(cpu(lambda: compose(history(arguments.pairs), DELTA, "pld"))))
        return
    print(f"CPU time on {processor()}, Python {platform.python_version()}")
    one_pair("pld", counts=1000, calibrations=100)
    ledger()
    if arguments.before:
        one_pair("prv", counts=20, calibrations=5)
        line("prv: 10 pairs", cpu(lambda: epsilon_spent(history(10), DELTA, "prv")))


if __name__ == "__main__":
    main()
