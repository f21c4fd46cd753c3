"""How far estimates of `lalora plan --cost` are from measured runs, and what its constants are fitted to.

    python -m benchmarks.cost_model              predicted and measured CPU-seconds of a round, and memory, inline, one thread
    python -m benchmarks.cost_model --fit        what a message and a round take beside the steps, from runs of one step

A measured run is one of `benchmarks.simulation`: made-up records, a process of its own. The configurations of the first table
are none of those that the constants were fitted to.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.child import measured
from benchmarks.job import Job, save_minilm, settings_of
from benchmarks.machine import processor
from lalora_flwr.cost.estimate import Estimate, Estimator
from lalora_flwr.cost.prices import Here

FIT = [(cohort, rank) for cohort in (5, 20) for rank in (4, 64)]
HELD_OUT = (  # model, sites of a round, local steps, batch, rank
    ("vit", 10, 1, 10, 4),
    ("vit", 10, 10, 10, 4),
    ("vit", 10, 10, 40, 4),
    ("vit", 30, 3, 20, 16),
    ("vit", 8, 5, 64, 8),
    ("minilm", 10, 1, 4, 4),
    ("minilm", 5, 4, 16, 8),
    ("minilm", 4, 2, 32, 32),
)


def estimator() -> Estimator:
    torch.set_num_threads(1)
    return Estimator(Here(clock=time.thread_time), time.thread_time)


def job_of(folder: str, model: str, cohort: int, steps: int, batch: int, rank: int) -> Job:
    rounds = 8 if model == "minilm" or steps > 4 else 40
    return Job(cohort, cohort, steps, batch, rounds, model=model, strategy="la-lora", folder=folder, rank=rank)


def predicted(job: Job) -> Estimate:
    return estimator().estimate(settings_of(job, "unused"), "inline", tokens=32)


def table(folder: str, repeats: int) -> None:
    print("| model | sites | K | b | rank | predicted (s) | measured (s) | ratio | memory predicted (MB) | measured |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for case in HELD_OUT:
        job = job_of(folder, *case)
        guesses, runs = [], []
        for _ in range(repeats):  # in turns: what else the machine does changes from minute to minute
            guesses.append(predicted(job))
            runs.append(measured("inline", job.text(), {}))
        guess, run = min(guess.round_seconds for guess in guesses), min(run["cpu"] for run in runs)
        memory, held = guesses[0].worker_bytes / 2**20, min(run["memory"] for run in runs)
        shape = " | ".join(str(value) for value in case)
        print(f"| {shape} | {guess:.3f} | {run:.3f} | {guess / run:.2f} | {memory:.0f} | {held:.0f} |", flush=True)


def fit(folder: str, repeats: int) -> None:
    """Least squares of what is left of a round without its steps: calls and bytes of a message, calls and bytes of a round."""
    rows, left = [], []
    for cohort, rank in FIT:
        job = job_of(folder, "vit", cohort, 1, 4, rank)  # small steps, so that what they are off by is small, too
        estimates = [predicted(job) for _ in range(repeats)]
        step = min(one.pass_seconds + one.release_seconds for one in estimates)
        call = min(estimator().call() for _ in range(5))
        run = min(measured("inline", job.text(), {})["cpu"] for _ in range(repeats))
        rows.append([cohort * call, cohort * estimates[0].adapter_bytes, call])
        left.append(run - cohort * step)
        print(
            f"{cohort} sites, rank {rank}: {run:.4f} s a round, {cohort * step:.4f} s of it steps, call {call * 1e6:.2f} µs",
            flush=True,
        )
    matrix = np.array(rows)
    scale = matrix.max(axis=0)
    found = np.linalg.lstsq(matrix / scale, np.array(left), rcond=None)[0] / scale
    print(
        f"a message {found[0]:.0f} calls, a byte of it {found[1]:.2e} s (site and server together), a round {found[2]:.0f} calls"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--repeats", type=int, default=2)
    asked = parser.parse_args()
    print(f"{processor()}, torch {torch.__version__}, one thread\n")
    with tempfile.TemporaryDirectory() as folder:
        save_minilm(Path(folder))
        (fit if asked.fit else table)(folder, asked.repeats)


if __name__ == "__main__":
    main()
