"""Frozen linear layers whose product for a few rows is that for many, to the bit, on processors that sum few rows otherwise.

A classification head sees a row for each record. With fewer than four, kernels for vectors take over, which round otherwise,
so that a record's gradient would depend on whether sites share a pass (`lalora_flwr.training.together`). Rows of zeros cost
next to nothing there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from lalora_flwr.gradients.products import KERNELS
from lalora_flwr.models.four_bits import FourBitLinear, frozen_product

FEWEST = 4  # rows from which on the kernels for matrices are taken


class SteadyLinear(nn.Linear):
    """A linear layer that never sees fewer rows than `FEWEST`."""

    def forward(self, input: Tensor) -> Tensor:
        return _steadily(input, lambda rows: KERNELS.linear(rows, self.weight, self.bias))


class SteadyFourBitLinear(FourBitLinear):
    """The same in four bits."""

    def forward(self, input: Tensor) -> Tensor:
        return _steadily(input, lambda rows: frozen_product(rows, self, self.bias, KERNELS.product))


STEADY: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: SteadyLinear, FourBitLinear: SteadyFourBitLinear}


def _steadily(x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
    """What the layer says of x, (…, in), with rows of zeros where it has too few."""
    rows = math.prod(x.shape[:-1])
    if rows >= FEWEST or not rows:
        return layer(x)
    filled = F.pad(x.reshape(rows, -1), (0, 0, 0, FEWEST - rows))
    return layer(filled)[:rows].view(*x.shape[:-1], -1)


def keep_steady(model: nn.Module) -> None:
    """Make all plain linear layers of a model, in place, steady ones."""
    for module in model.modules():
        module.__class__ = STEADY.get(type(module), type(module))
