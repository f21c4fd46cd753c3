"""Frozen linear layers whose product for a few rows is that for many, to the bit, on processors that sum few rows otherwise.

A classification head sees a row for each record. With fewer than four, kernels for vectors take over, which round otherwise,
so that a record's gradient would depend on whether sites share a pass (`lalora_flwr.training.together`). Rows of zeros cost
next to nothing there.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lalora_flwr.gradients.products import KERNELS

FEWEST = 4  # rows from which on the kernels for matrices are taken


class SteadyLinear(nn.Linear):
    """A linear layer that never sees fewer rows than `FEWEST`."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.numel() // self.in_features
        if rows >= FEWEST or not rows:
            return KERNELS.linear(input, self.weight, self.bias)
        filled = F.pad(input.reshape(rows, -1), (0, 0, 0, FEWEST - rows))
        return KERNELS.linear(filled, self.weight, self.bias)[:rows].view(*input.shape[:-1], -1)


def keep_steady(model: nn.Module) -> None:
    """Make all plain linear layers of a model, in place, `SteadyLinear`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = SteadyLinear
