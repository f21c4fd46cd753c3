"""The step of LA-LoRA's Theorem 2 (arXiv 2602.19926), as a filter: the least-squares image of the layer's own gradient, damped.

    ĝ_B = g_B (A Aᵀ + δ I)⁻¹        ĝ_A = (Bᵀ B + δ I)⁻¹ g_A        g: the noised gradient;  A of shape (r, n), B (m, r)

The other factor is the one that the step finds: after a step of A the next one of B has the new A. It is post-processing of g and
of what earlier releases made of the adapter, and safe under record-level DP as published. Left out: the theorem's factor (r/α)²,
which is the learning rate's business. Added: δ, since B starts at zero. In directions in which the other factor is small, noise
grows as the signal does, by up to 1/δ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lalora_flwr.adapter.slots import LORA_B, Layout, Slot, factors_of
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.filters import Around, Filter, State

if TYPE_CHECKING:
    from torch import Tensor

DAMPING = 0.1  # δ: of A Aᵀ, which starts near 1/3, and of Bᵀ B, which starts at zero


class Precondition(Filter):
    """The filter; what is no factor keeps its gradient."""

    name = "precondition"
    keeps = 0.0
    stretch = 1 / DAMPING

    def fits(self, layout: Layout) -> None:
        if not any(True for _ in factors_of(layout)):
            raise ConfigError(f"filter.name = {self.name!r}: the form has no layer with lora_A and lora_B; choose another filter")

    def __call__(self, slot: Slot, gradient: Tensor, state: State, around: Around) -> Tensor:
        return gradient if around.other is None else preconditioned(gradient, around.other, is_b=slot.part == LORA_B)


def preconditioned(gradient: Tensor, other: Tensor, *, is_b: bool) -> Tensor:
    """The gradient of one factor in the metric of the other, computed in float64.

    Args:
        gradient: of B, (m, r), or of A, (r, n).
        other: A, (r, n), or B, (m, r).
        is_b: whether the gradient is of B.

    Returns:
        Of the gradient's shape and type.
    """
    import torch  # here only: the names of filters are checked before torch is needed

    g, x = gradient.double(), other.double()
    if is_b:
        g, x = g.T, x.T
    square = x.T @ x + DAMPING * torch.eye(x.shape[1], device=x.device, dtype=x.dtype)
    solved: Tensor = torch.linalg.solve_ex(square, g).result  # of values that are not finite: none that are
    return (solved.T if is_b else solved).to(gradient.dtype).contiguous()


PRECONDITION = Precondition()
