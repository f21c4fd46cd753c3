"""LoRA with a core: W = W0 + (α/r) B R A, where only R trains (arXiv 2502.15436); A, B and R are slots of their layer.

A of shape (r, n) and B (m, r) have orthonormal rows and columns that the seed draws; R (r, r) starts at zero. The paper starts
from singular vectors of a first gradient of private records, which would cost ε: left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from lalora_flwr.adapter.form import Adapter
from lalora_flwr.adapter.lora import DEFAULT, Lora, LoraAdapter
from lalora_flwr.adapter.lora_export import Factors
from lalora_flwr.adapter.slots import LORA_A, LORA_B, Slot

LORA_R = "lora_R"
GRID = 2.0**-16  # of A and B: last digits in which machines differ do not show, and a start's digest is the same on all


class Core(nn.Module):
    """In the place of PEFT's B: R, then B. (…, r) to (…, m)."""

    def __init__(self, up: nn.Linear) -> None:
        super().__init__()
        rank, device = up.in_features, up.weight.device
        self.core = nn.Linear(rank, rank, bias=False, device=device)
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.core(x))
        return y


class CoreAdapter(LoraAdapter):
    """A LoRA whose layers have cores; its folder is that of LoRA with B R for B."""

    def roles(self, name: str, layer: str, module: LoraLayer) -> Iterator[tuple[Slot, nn.Parameter]]:
        A, core = module.lora_A[DEFAULT], module.lora_B[DEFAULT]
        assert isinstance(A, nn.Linear) and isinstance(core, Core)
        for part, linear in ((LORA_A, A), (LORA_R, core.core), (LORA_B, core.up)):
            slot = Slot(f"{name}.{part}.weight", layer, part, tuple(linear.weight.shape), frozen=part != LORA_R)
            yield slot, linear.get_parameter("weight")

    def stir(self, generator: torch.Generator) -> None:
        Adapter.stir(self, generator)

    def exported(self) -> dict[str, Factors]:
        layers: dict[str, dict[str, Tensor]] = {}
        for name, slot in self.layout.items():
            layers.setdefault(slot.layer, {})[slot.part] = self.parameters[name].detach().cpu()
        return {
            layer: (own[LORA_A], (own[LORA_B].double() @ own[LORA_R].double()).float())
            for layer, own in layers.items()
            if LORA_R in own
        }

    def save(self, folder: Path) -> None:
        self.save_as_lora(folder, self.exported())


class LoraSb(Lora):
    """As LoRA, with a core in each layer."""

    gate = LORA_R
    parts = frozenset({LORA_R})
    adapter_type = CoreAdapter

    def extend(self, module: LoraLayer) -> None:
        up = module.lora_B[DEFAULT]
        assert isinstance(up, nn.Linear)
        module.lora_B[DEFAULT] = Core(up)

    def start(self, module: LoraLayer) -> None:
        A, core = module.lora_A[DEFAULT], module.lora_B[DEFAULT]
        assert isinstance(A, nn.Linear) and isinstance(core, Core)
        for weight in (A.weight, core.up.weight):
            drawn = torch.nn.init.orthogonal_(torch.empty(weight.shape, dtype=torch.float64))
            weight.copy_((drawn / GRID).round() * GRID)
        core.core.weight.zero_()


LORA_SB = LoraSb()
