"""What a private LoRA step costs: this engine against the non-private step and Opacus' engines.

    python -m benchmarks.engine [--models swin-tiny swin-base roberta-base] [--repeats 4] [--threads 2]
    python -m benchmarks.engine --batch 16 32 64 --repeats 20 [--compile]       on a GPU, which it takes if there is one

For each model one table. All engines take turns in one process; time is the fastest of the repeats, memory the peak of
live tensor bytes above the level before the step; both are shown as ratios to the non-private float32 step (stock PEFT).
A step is forward, gradients, clipping, noise and SGD. On Swin, Opacus runs behind a wrapper that presents all windows of
an image as one record, since stock Opacus takes a window for a record or crashes. Random weights: cost does not depend on
them. ``--compile`` adds rows for models that torch.compile has compiled. The last table is a whole round: LA-LoRA by
`train_round` against DP-LoRA by Opacus' hooks, same records and steps.
"""

from __future__ import annotations

import argparse
import platform
import time

import torch

from benchmarks.steps import Step, Subject, opacus_step, our_step, plain_step
from lalora_flwr.data.records import Records
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.methods.schedules import schedule_of
from lalora_flwr.methods.smoothing import GAUSS5
from lalora_flwr.privacy.counting import RunLedger
from lalora_flwr.privacy.events import Target
from lalora_flwr.privacy.mechanism import Mechanism
from lalora_flwr.privacy.randomness import SeededRandom
from lalora_flwr.settings import TrainSettings
from lalora_flwr.training.learner import Learner
from lalora_flwr.training.local import LocalRound, train_round

BATCH = {"swin-tiny": 16, "swin-base": 4, "roberta-base": 16}
ROUND_STEPS = 4


def engines(name: str, device: torch.device, batch: int, compiled: bool) -> dict[str, Step]:
    """Every engine's step for one model, each with its own copy of it."""

    def subject(factors: str = "AB", dtype: torch.dtype = torch.float32, compiled: bool = False) -> Subject:
        return Subject(name, dtype, device, factors, batch, compiled)

    def ours(factors: str, dtype: torch.dtype = torch.float32) -> Step:
        return our_step(subject(factors, dtype))

    bf16 = torch.bfloat16
    of_compiled = {
        "non-private, A+B, compiled": plain_step(subject(compiled=True)),
        "ours, A+B, compiled": our_step(subject(compiled=True)),
        "ours bf16 base, A+B, compiled": our_step(subject(dtype=bf16, compiled=True)),
    }
    return {
        "non-private, A+B": plain_step(subject()),
        "non-private, B": plain_step(subject("B")),
        "ours, A+B": ours("AB"),
        "ours, B": ours("B"),
        "ours, A": ours("A"),
        "Opacus hooks, A+B": opacus_step(subject(), "hooks"),
        "Opacus hooks, B": opacus_step(subject("B"), "hooks"),
        "Opacus functorch, A+B": opacus_step(subject(), "functorch"),
        "Opacus ghost, A+B": opacus_step(subject(), "ghost"),
        "non-private bf16 base, A+B": plain_step(subject(dtype=bf16)),
        "ours bf16 base, A+B": ours("AB", bf16),
        "ours bf16 base, B": ours("B", bf16),
        "ours bf16 base, A": ours("A", bf16),
        **(of_compiled if compiled else {}),
    }


def clock(step: Step, device: torch.device) -> float:
    """Seconds of one step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def peak_bytes(step: Step, device: torch.device) -> int:
    """Peak of live tensor bytes during a step, above the level before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    events = trace.profiler.kineto_results.events()  # type: ignore[union-attr]
    level = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def step_table(name: str, batch: int, repeats: int, device: torch.device, compiled: bool) -> None:
    steps = engines(name, device, batch, compiled)
    for engine, step in list(steps.items()):
        try:
            step()  # warm-up
        except torch.OutOfMemoryError:
            print(f"{name}, batch {batch}: no memory for {engine}")
            del steps[engine]
    seconds: dict[str, list[float]] = {engine: [] for engine in steps}
    for _ in range(repeats):
        for engine, step in steps.items():
            seconds[engine].append(clock(step, device))
    peaks = {engine: peak_bytes(step, device) for engine, step in steps.items()}
    first = next(iter(steps))
    unit = f"{1000 * min(seconds[first]):.1f} ms, {peaks[first] / 1e6:.0f} MB"
    print(f"\n**{name}, batch {batch}** (non-private float32 step: {unit})\n")
    print("| step | time | memory |\n|---|---|---|")
    for engine in steps:
        print(f"| {engine} | {min(seconds[engine]) / min(seconds[first]):.2f} | {peaks[engine] / peaks[first]:.2f} |", flush=True)


def our_round(subject: Subject) -> Step:
    """A round of LA-LoRA with the filter, as a site runs it."""
    adapter = subject.adapter
    learner = Learner(subject.base, adapter, PerSampleGradients(adapter.model, adapter.parameters), adapter.state())
    records = Records(subject.inputs, subject.labels)
    masks = schedule_of("step:BA").masks(adapter.layout, 1, ROUND_STEPS, {})
    what = LocalRound(1, adapter.layout, masks, GAUSS5, TrainSettings(local_steps=ROUND_STEPS, lr=1e-4))

    def step() -> None:
        train_round(
            learner,
            records,
            what,
            mechanism=Mechanism(1.0, 1.0, 1.0, float(subject.records)),  # q = 1: the same batch for both sides
            ledger=RunLedger(Target(float("inf"), 1e-5, 10**9, "pld")),
            source=SeededRandom(0, 0, 0),
            memory={},
        )

    return step


def round_table(names: list[str], repeats: int, device: torch.device) -> None:
    print(f"\n**One round of {ROUND_STEPS} steps: LA-LoRA here against DP-LoRA with Opacus hooks in float32**\n")
    print("| model | time, float32 | memory, float32 | time, bf16 base | memory, bf16 base |\n|---|---|---|---|---|")
    for name in names:
        opacus = opacus_step(Subject(name, torch.float32, device, "AB", BATCH[name]), "hooks")
        rounds: dict[str, Step] = {
            "opacus": lambda step=opacus: [step() for _ in range(ROUND_STEPS)] and None,  # type: ignore[misc]
            "float32": our_round(Subject(name, torch.float32, device, "AB", BATCH[name])),
            "bf16": our_round(Subject(name, torch.bfloat16, device, "AB", BATCH[name])),
        }
        for step in rounds.values():
            step()
        seconds: dict[str, list[float]] = {engine: [] for engine in rounds}
        for _ in range(max(1, repeats // 2)):
            for engine, step in rounds.items():
                seconds[engine].append(clock(step, device))
        peaks = {engine: peak_bytes(step, device) for engine, step in rounds.items()}
        row = f"| {name} |"
        for kind in ("float32", "bf16"):
            row += f" {min(seconds[kind]) / min(seconds['opacus']):.2f} | {peaks[kind] / peaks['opacus']:.2f} |"
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=BATCH, default=list(BATCH))
    parser.add_argument("--batch", nargs="+", type=int, help="records of a step (default: what two CPU cores do in seconds)")
    parser.add_argument("--compile", action="store_true", help="rows for models compiled by torch.compile, too")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU, {arguments.threads} threads"
    print(f"torch {torch.__version__} on {where}; {arguments.repeats} repeats; command: python -m benchmarks.engine")
    for name in arguments.models:
        for batch in arguments.batch or [BATCH[name]]:
            step_table(name, batch, arguments.repeats, device, arguments.compile)
    round_table(arguments.models, arguments.repeats, device)


if __name__ == "__main__":
    main()
