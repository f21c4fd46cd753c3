"""A learning rate of its own for lora_A: ``slow-a``, or with another number ``slow-a:0.25``.

    ĝ_A = s g_A        ĝ_B = g_B        g: the noised gradient;  s = 0.1

A bears a fraction of the noise that B does (`lalora_flwr.training.rate`): one rate for both is too large for A or too small
for B. LoRA+ (arXiv 2402.12354) has the same, for wide networks without noise. AdamW, whose steps are as long whatever a gradient
is multiplied with, would undo it. Safe under record-level DP: it follows the noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lalora_flwr.adapter.slots import LORA_A, Layout, Slot
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.filters import Around, Share, State

if TYPE_CHECKING:
    from torch import Tensor


class Slower(Share):
    """The filter; what is no lora_A keeps its gradient."""

    stretch = 1.0
    only_scales = True

    def fits(self, layout: Layout) -> None:
        if not layout.of(LORA_A) & layout.trainable:
            raise ConfigError(f"filter.name = {self.name!r}: the form trains no lora_A; choose another filter")

    def scale(self, slot: Slot) -> float:
        return self.share if slot.part == LORA_A else 1.0

    def kept(self, slot: Slot) -> float:
        return self.scale(slot) ** 2

    def __call__(self, slot: Slot, gradient: Tensor, state: State, around: Around) -> Tensor:
        return gradient * self.share if slot.part == LORA_A else gradient


SLOW_A = Slower("slow-a", 0.1)
