"""Frozen layers whose products do not depend on how few rows there are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lalora_flwr.gradients.few_rows import FEWEST, SteadyLinear, keep_steady
from tests.conftest import MODELS, small


@pytest.mark.parametrize("shape", [(0, 6), (6,), (1, 6), (3, 6), (1, 2, 6), (4, 6), (5, 2, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_layer(shape: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(6, 5, bias).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    wanted = layer(x)
    (slope,) = torch.autograd.grad(wanted.square().sum(), x)
    keep_steady(layer)
    found = layer(x)
    assert type(layer) is SteadyLinear and torch.allclose(found, wanted) and found.shape == wanted.shape
    assert torch.allclose(torch.autograd.grad(found.square().sum(), x)[0], slope)


def test_the_product_always_has_enough_rows() -> None:
    seen: list[int] = []
    layer = SteadyLinear(6, 5)
    with torch.profiler.profile(record_shapes=True) as profile:
        layer(torch.randn(1, 6))
    for event in profile.events():
        if event.name in ("aten::addmm", "aten::mm"):
            seen += [shape[0] for shape in event.input_shapes if len(shape) == 2 and shape[1] == 6]
    assert seen == [FEWEST]


def test_a_learners_frozen_head_is_one(tmp_path: Path) -> None:
    learner = MODELS.learner(small(tmp_path))
    heads = [module for name, module in learner.adapter.model.named_modules() if name.endswith(learner.base.head)]
    assert heads and all(type(head) is SteadyLinear for head in heads)
    assert all(module.training for module in learner.adapter.model.modules())
