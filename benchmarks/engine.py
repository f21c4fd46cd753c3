"""What a private LoRA step costs: this engine against the non-private step and Opacus' engines.

    python -m benchmarks.engine [--models swin-tiny swin-base roberta-base] [--repeats 4] [--threads 2]

For each model one table. All engines take turns in one process; time is the fastest of the repeats, memory the peak of
live tensor bytes above the level before the step; both are shown as ratios to the non-private float32 step (stock PEFT).
A step is forward, gradients, clipping, noise and SGD. On Swin, Opacus runs behind a wrapper that presents all windows of
an image as one record, since stock Opacus takes a window for a record or crashes. Random weights: cost does not depend on
them. The last table is a whole round: LA-LoRA by `train_round` against DP-LoRA by Opacus' hooks, same records and steps.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.architectures import build
from lalora_flwr.adapter.lora import LORA
from lalora_flwr.adapter.slots import LORA_A, LORA_B
from lalora_flwr.data.inputs import Inputs, to_device
from lalora_flwr.data.records import Records
from lalora_flwr.gradients.dropout import remove_dropout
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.methods.schedules import schedule_of
from lalora_flwr.methods.smoothing import GAUSS5
from lalora_flwr.models.base import BaseModel
from lalora_flwr.privacy.counting import RunLedger
from lalora_flwr.privacy.events import Target
from lalora_flwr.privacy.mechanism import Mechanism, PrivateSum
from lalora_flwr.privacy.randomness import SeededRandom
from lalora_flwr.settings import LoraSettings, TrainSettings
from lalora_flwr.training.learner import Learner
from lalora_flwr.training.local import LocalRound, train_round

BATCH = {"swin-tiny": 16, "swin-base": 4, "roberta-base": 16}
RANKS = {
    "swin-tiny": LoraSettings(rank=16, alpha=16.0),
    "swin-base": LoraSettings(rank=16, alpha=16.0),
    "roberta-base": LoraSettings(rank=8, alpha=8.0, targets="query,value"),
}
ROUND_STEPS = 4
Step = Callable[[], None]


class Subject:
    """One model with its adapter, batch and optimizer."""

    def __init__(self, name: str, dtype: torch.dtype, device: torch.device, factors: str, batch: int) -> None:
        self.base: BaseModel = build(name, small=False)
        self.base.module.to(device, dtype)
        self.adapter = LORA.attach(self.base, RANKS[name], seed=0)
        self.model: nn.Module = self.adapter.model.to(device).train()  # Opacus insists
        remove_dropout(self.model)  # so that every engine does the same work
        self.records = batch
        inputs, self.labels = self.base.synthetic_batch(batch, torch.Generator().manual_seed(0))
        self.inputs: Inputs = to_device(inputs, device)
        self.labels = self.labels.to(device)
        with torch.no_grad():
            for parameter in self.adapter.parameters.values():
                parameter.normal_(std=0.02)
        parts = {"A": LORA_A, "B": LORA_B}
        self.active = self.adapter.activate(self.adapter.layout.of(*(parts[letter] for letter in factors)))
        self.optimizer = torch.optim.SGD(self.active.values(), lr=1e-4)

    def losses(self) -> Tensor:
        return self.base.losses(self.model, self.inputs, self.labels)


def plain_step(subject: Subject) -> Step:
    """The non-private LoRA step: stock PEFT and autograd."""

    def step() -> None:
        subject.losses().mean().backward()
        subject.optimizer.step()
        subject.optimizer.zero_grad()

    return step


def our_step(subject: Subject) -> Step:
    engine = PerSampleGradients(subject.model, subject.adapter.parameters)
    mechanism = Mechanism(1.0, 1.0, 1.0, float(subject.records))
    ledger = RunLedger(Target(float("inf"), 1e-5, 10**9, "pld"))
    source = SeededRandom(0, 0, 0)
    device = next(iter(subject.active.values())).device

    def step() -> None:
        total = PrivateSum(mechanism, {name: p.shape for name, p in subject.active.items()}, device)
        total.add(engine(subject.records, subject.losses))
        ledger.reserve(1.0, 1.0, 1)
        for name, gradient in total.release(ledger, source).items():
            subject.active[name].grad = gradient
        subject.optimizer.step()
        subject.optimizer.zero_grad()

    return step


class Fold(nn.Module):
    """Presents (records * windows, tokens, features) to a linear layer as (records, windows * tokens, features)."""

    def __init__(self, inner: nn.Linear, records: int) -> None:
        super().__init__()
        self.inner, self.records = inner, records

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(self.records, -1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def _fold_windows(subject: Subject) -> None:
    for module in list(subject.model.modules()):
        for factor in ("lora_A", "lora_B"):
            if isinstance(getattr(module, factor, None), nn.ModuleDict):
                getattr(module, factor)["default"] = Fold(getattr(module, factor)["default"], subject.records)
    subject.active = {n: p for n, p in subject.model.named_parameters() if p.requires_grad}
    subject.optimizer = torch.optim.SGD(subject.active.values(), lr=1e-4)


class _Logits(nn.Module):
    """A model whose call takes one argument and returns logits, as Opacus' wrappers like it."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.model, self.base = subject.model, subject.base

    def forward(self, inputs: Inputs) -> Tensor:
        return self.base.logits(self.model, inputs)


def opacus_step(subject: Subject, engine: str) -> Step:
    """A step of Opacus: ``hooks``, ``functorch`` or ``ghost``."""
    from opacus import GradSampleModule
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    if "swin" in subject.base.name:
        _fold_windows(subject)
    common = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": subject.records}
    loss = nn.CrossEntropyLoss()
    if engine == "ghost":
        wrapped: Any = GradSampleModuleFastGradientClipping(_Logits(subject), max_grad_norm=1.0)
        optimizer: Any = DPOptimizerFastGradientClipping(subject.optimizer, **common)
        criterion: Any = DPLossFastGradientClipping(wrapped, optimizer, loss)
    else:
        wrapped = GradSampleModule(_Logits(subject), force_functorch=engine == "functorch")
        optimizer, criterion = DPOptimizer(subject.optimizer, **common), loss

    def step() -> None:
        criterion(wrapped(subject.inputs), subject.labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def engines(name: str, device: torch.device) -> dict[str, Step]:
    """Every engine's step for one model, each with its own copy of it."""

    def subject(factors: str = "AB", dtype: torch.dtype = torch.float32) -> Subject:
        return Subject(name, dtype, device, factors, BATCH[name])

    def ours(factors: str, dtype: torch.dtype = torch.float32) -> Step:
        return our_step(subject(factors, dtype))

    bf16 = torch.bfloat16
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


def step_table(name: str, repeats: int, device: torch.device) -> None:
    steps = engines(name, device)
    for step in steps.values():
        step()  # warm-up
    seconds: dict[str, list[float]] = {engine: [] for engine in steps}
    for _ in range(repeats):
        for engine, step in steps.items():
            seconds[engine].append(clock(step, device))
    peaks = {engine: peak_bytes(step, device) for engine, step in steps.items()}
    first = next(iter(steps))
    unit = f"{min(seconds[first]):.2f} s, {peaks[first] / 1e6:.0f} MB"
    print(f"\n**{name}, batch {BATCH[name]}** (non-private float32 step: {unit})\n")
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
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU, {arguments.threads} threads"
    print(f"torch {torch.__version__} on {where}; {arguments.repeats} repeats; command: python -m benchmarks.engine")
    for name in arguments.models:
        step_table(name, arguments.repeats, device)
    round_table(arguments.models, arguments.repeats, device)


if __name__ == "__main__":
    main()
