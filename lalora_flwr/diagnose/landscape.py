"""Slices of a loss around a point, along filter-normalised random directions (arXiv 1712.09913).

Each row of a direction has the length of the row of the weight that it is added to, so that a distance of 1 moves every weight by
as much as it is long, and slices of models whose weights differ in scale can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

RADIUS = 1.0


@dataclass(frozen=True)
class Landscape:
    """
    Attributes:
        at: distances along a direction.
        line: the loss at each of them along the first direction.
        plane: the loss by the place on the second direction and that on the first, on every other distance.
    """

    at: tuple[float, ...]
    line: tuple[float, ...]
    plane: tuple[tuple[float, ...], ...]

    @property
    def coarse(self) -> tuple[float, ...]:
        """The distances of the plane."""
        return self.at[::2]


def direction(weights: Sequence[Tensor], seed: int) -> list[Tensor]:
    """A random direction, the same for models of the same shapes before each row gets its length; a vector has but one row."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for weight in weights:
        drawn = torch.randn(weight.shape, generator=generator).to(weight)
        rows, own = drawn.reshape(len(drawn) if drawn.dim() > 1 else 1, -1), weight.detach().reshape(drawn.shape)
        lengths = own.reshape(rows.shape).norm(dim=1, keepdim=True)
        found.append((rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12) * lengths).reshape(weight.shape))
    return found


@torch.no_grad()
def landscape(loss: Callable[[], float], weights: Sequence[nn.Parameter], points: int, seed: int = 0) -> Landscape:
    """The loss on a line and on a plane; the weights are as they were when it returns.

    Args:
        loss: with the weights as they are.
        weights: moved together.
        points: along each side of the plane, odd; the line has twice as many, less one.
        seed: of the directions.
    """
    start = [weight.detach().clone() for weight in weights]
    first, second = direction(start, 2 * seed), direction(start, 2 * seed + 1)
    at = torch.linspace(-RADIUS, RADIUS, 2 * points - 1).tolist()

    def there(x: float, y: float) -> float:
        for weight, own, a, b in zip(weights, start, first, second, strict=True):
            weight.copy_(own + x * a + y * b)
        return loss()

    try:
        line = tuple(there(x, 0.0) for x in at)
        plane = tuple(tuple(there(x, y) if y else line[2 * i] for i, x in enumerate(at[::2])) for y in at[::2])
    finally:
        for weight, own in zip(weights, start, strict=True):
            weight.copy_(own)
    return Landscape(tuple(at), line, plane)
