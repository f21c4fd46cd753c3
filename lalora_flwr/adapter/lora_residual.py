"""LoRA and a change of the frozen weights that the server makes: W = W0 + (α/r) (B A + D).

D, of the weight's own shape (m, n), never trains and has no per-record gradient. It is a slot all the same: it starts at zero,
travels down, is part of every digest and checkpoint, and of what is saved. The frozen weights themselves stay as they are
published, so that all models of a process share them, and a site that missed a round has lost nothing.

It costs 4 m n bytes for each adapted layer on the way to every site in every round, and as much memory; up comes what it does for
LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from lalora_flwr.adapter.lora import DEFAULT, Lora, LoraAdapter
from lalora_flwr.adapter.lora_export import Factors, factored
from lalora_flwr.adapter.slots import LORA_A, LORA_B, Layout, Slot

LORA_D = "lora_D"


class WithResidual(nn.Module):
    """A frozen linear layer and the change of its weight. (…, n) to (…, m), in the precision of the frozen layer.

    Attributes:
        layer: the frozen one.
        residual: a linear layer with D for a weight.
        scale: what D is multiplied with.
    """

    def __init__(self, layer: nn.Module, inputs: int, outputs: int, scale: float, device: torch.device) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        self.residual = nn.Linear(inputs, outputs, bias=False, device=device)
        self.residual.weight.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        """Of the frozen layer, for whoever asks it for its device or precision."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        change: Tensor = self.residual(x)
        return y + (self.scale * change).to(y.dtype)


class ResidualAdapter(LoraAdapter):
    """A LoRA with a residual in each layer; its folder is that of a LoRA of as high a rank as B A + D has."""

    def roles(self, name: str, layer: str, module: LoraLayer) -> Iterator[tuple[Slot, nn.Parameter]]:
        yield from super().roles(name, layer, module)
        base = module.base_layer
        assert isinstance(base, WithResidual)
        weight = base.residual.get_parameter("weight")
        yield Slot(f"{name}.{LORA_D}.weight", layer, LORA_D, tuple(weight.shape), frozen=True), weight

    def exported(self) -> dict[str, Factors]:
        """The total of each layer; of rank r while there is no residual."""
        factors = {}
        for name_A, name_B, name_D in residuals_of(self.layout):
            A, B, D = (self.parameters[name].detach().cpu() for name in (name_A, name_B, name_D))
            total = B.double() @ A.double() + D.double()
            factors[self.layout[name_A].layer] = factored(total) if D.any() else (A, B)
        return factors

    def save(self, folder: Path) -> None:
        self.save_as_lora(folder, self.exported())


class LoraResidual(Lora):
    """As LoRA, with a residual in each layer."""

    parts = Lora.parts | {LORA_D}
    adapter_type = ResidualAdapter

    def extend(self, module: LoraLayer) -> None:
        base, A, B = module.base_layer, module.lora_A[DEFAULT], module.lora_B[DEFAULT]
        assert isinstance(A, nn.Linear) and isinstance(B, nn.Linear)
        module.base_layer = WithResidual(base, A.in_features, B.out_features, module.scaling[DEFAULT], A.weight.device)

    def start(self, module: LoraLayer) -> None:
        super().start(module)
        assert isinstance(module.base_layer, WithResidual)
        module.base_layer.residual.weight.zero_()


def residuals_of(layout: Layout) -> Iterator[tuple[str, str, str]]:
    """The names of the slots of A, B and D of each layer that has them."""
    parts: dict[str, dict[str, str]] = {}
    for name, slot in layout.items():
        parts.setdefault(slot.layer, {})[slot.part] = name
    for own in parts.values():
        if own.keys() >= {LORA_A, LORA_B, LORA_D}:
            yield own[LORA_A], own[LORA_B], own[LORA_D]


LORA_RESIDUAL = LoraResidual()
