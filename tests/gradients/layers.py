"""Layers for the gradient engine, and each record by itself."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from tests.adapters import engine_for
from tests.reference import (
    assert_same_gradients,
    double_pair,
    one_by_one,
)

RECORDS = 4


def compare(model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], inputs: Tensor) -> dict[str, Tensor]:
    """Check the engine on a float64 model against the loop; ``loss`` maps (n, …) inputs to (n,) losses."""
    model, plain = double_pair(model)
    inputs = inputs.double()
    fast = engine_for(model)(len(inputs), lambda: loss(model, inputs))
    slow = one_by_one(plain, lambda m, j: loss(m, inputs[j : j + 1]).sum(), len(inputs))
    assert_same_gradients(fast, slow)
    return fast
