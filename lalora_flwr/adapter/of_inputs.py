"""A first lora_A that looks where the inputs of its layer vary.

    M = mean of x xᵀ and m = mean of x, over the tokens of public texts, x the input of a layer in the frozen model
    A = s · the r eigenvectors of M - m mᵀ with the largest eigenvalues, as rows;   s so that the mean of ‖A x‖² is a random A's

A random A sees a few hundredths of what varies in a layer of some hundred features; where A never trains (FFA-LoRA,
``steady-lora``), B's gradient, and so what noise is set against, is made of that alone. EVA (arXiv 2410.07170) starts from the
same directions of the private records, which no ε would cover.

Guarantee: no private record is read, so nothing here costs privacy; a site gets A from the server as it would any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lalora_flwr.adapter.form import Adapter
from lalora_flwr.adapter.slots import LORA_A, Slot
from lalora_flwr.data.inputs import Inputs, to_device
from lalora_flwr.models.base import BaseModel

AT_ONCE = 1 << 30  # bytes of the layers' moments in one reading of the texts
Batches = Callable[[], Iterable[Inputs]]


@dataclass
class Moments:
    """Of the inputs of a layer.

    Attributes:
        width: entries of an input.
        count: of inputs.
        total: their sum, float64 (width,).
        squares: sum of x xᵀ, float64 (width, width).
    """

    width: int
    count: int = 0
    total: Tensor = field(init=False)
    squares: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.width, dtype=torch.float64)
        self.squares = torch.zeros(self.width, self.width, dtype=torch.float64)

    def add(self, inputs: Tensor) -> None:
        """``inputs``: (n, width)."""
        rows = inputs.detach().to("cpu", torch.float64)
        self.count += len(rows)
        self.total += rows.sum(0)
        self.squares += rows.T @ rows

    def along(self, random: Tensor) -> Tensor:
        """A in place of a random one of shape (rank, width), as above."""
        mean, second = self.total / self.count, self.squares / self.count
        vectors: Tensor = torch.linalg.eigh(second - torch.outer(mean, mean))[1]  # of the smallest value first
        found = vectors[:, -len(random) :].T.flip(0)
        old = random.to("cpu", torch.float64)
        scale = (_size(old, second) / max(_size(found, second), 1e-300)) ** 0.5
        aligned: Tensor = found * scale
        return aligned.to(random.dtype)


def _size(a: Tensor, second: Tensor) -> float:
    """Mean of ‖A x‖², where ``second`` is that of x xᵀ."""
    return float((a @ second * a).sum())


@torch.no_grad()
def along_inputs(adapter: Adapter, base: BaseModel, batches: Batches, at_once: int = AT_ONCE) -> dict[str, Tensor]:
    """The adapter's values with every lora_A made of its layer's inputs.

    Args:
        adapter: of LoRA, as it starts: while B is zero, the layers' inputs are those of the frozen model.
        base: of the adapter.
        batches: of public texts, at least one, with ``attention_mask``; read again for layers whose moments did not fit.
        at_once: bytes of moments in one reading.
    """
    adapter.model.eval()
    state = dict(adapter.state())
    for slots in _groups([slot for slot in adapter.layout.values() if slot.part == LORA_A], at_once):
        found = {slot.name: Moments(slot.shape[1]) for slot in slots}
        mask: list[Tensor] = []
        hooks = [_layer(adapter.model, slot.name).register_forward_pre_hook(_adding(found[slot.name], mask)) for slot in slots]
        try:
            for inputs in batches():
                inputs = to_device(inputs, adapter.device)
                mask[:] = [inputs["attention_mask"].bool()] if isinstance(inputs, dict) else []
                base.logits(adapter.model, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        state |= {name: moments.along(state[name]) for name, moments in found.items()}
    return state


def _groups(slots: Sequence[Slot], at_once: int) -> Iterable[list[Slot]]:
    """Slots whose moments fit into so many bytes together, at least one."""
    group: list[Slot] = []
    held = 0
    for slot in slots:
        if group and held + 8 * slot.shape[1] ** 2 > at_once:
            yield group
            group, held = [], 0
        group.append(slot)
        held += 8 * slot.shape[1] ** 2
    if group:
        yield group


def _layer(model: nn.Module, name: str) -> nn.Module:
    """The wrapped layer that a lora_A belongs to."""
    return model.get_submodule(name[: name.rindex(f".{LORA_A}")])


def _adding(moments: Moments, mask: Sequence[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows, seen = inputs[0].flatten(0, -2), mask[0].flatten()
        moments.add(rows[seen] if len(rows) == len(seen) else rows)  # a pooled text has no tokens that are padding

    return add
