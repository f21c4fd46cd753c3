"""One private or plain LoRA step of one model, by this engine, stock PEFT and Opacus: what `benchmarks.engine` times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.architectures import build
from lalora_flwr.adapter.lora import LORA
from lalora_flwr.adapter.slots import LORA_A, LORA_B
from lalora_flwr.data.inputs import Inputs, to_device
from lalora_flwr.gradients.dropout import remove_dropout
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.models.base import BaseModel
from lalora_flwr.privacy.counting import RunLedger
from lalora_flwr.privacy.events import Target
from lalora_flwr.privacy.mechanism import Mechanism, PrivateSum
from lalora_flwr.privacy.randomness import SeededRandom
from lalora_flwr.settings import LoraSettings

RANKS = {
    "swin-tiny": LoraSettings(rank=16, alpha=16.0),
    "swin-base": LoraSettings(rank=16, alpha=16.0),
    "roberta-base": LoraSettings(rank=8, alpha=8.0, targets="query,value"),
}
Step = Callable[[], None]


class Subject:
    """One model with its adapter, batch and optimizer."""

    def __init__(
        self, name: str, dtype: torch.dtype, device: torch.device, factors: str, batch: int, compiled: bool = False
    ) -> None:
        self.base: BaseModel = build(name, small=False)
        self.base.module.to(device, dtype)
        self.adapter = LORA.attach(self.base, RANKS[name], seed=0)
        self.model: nn.Module = self.adapter.model.to(device).train()  # Opacus insists
        remove_dropout(self.model)  # so that every engine does the same work
        self.forward: Any = torch.compile(self.model) if compiled else self.model
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
        return self.base.losses(self.forward, self.inputs, self.labels)


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
