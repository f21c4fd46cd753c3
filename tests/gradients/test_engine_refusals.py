"""What the gradient engine refuses by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.ground.errors import ConfigError
from tests.adapters import engine_for
from tests.gradients.layers import RECORDS, compare
from tests.reference import (
    BASES,
    adapted,
    generator,
)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_trainable_parameter_outside_the_forward_pass_is_refused_by_name() -> None:
    model = Unused()
    with pytest.raises(RuntimeError, match=r"spare\.weight"):
        engine_for(model)(2, lambda: model(torch.ones(2, 3)).sum(1))


def test_a_parameter_that_is_neither_frozen_nor_trained_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(ConfigError, match=r"1\.weight: not frozen"):
        PerSampleGradients(model, dict(model[0].named_parameters()))


@pytest.mark.parametrize("shape", [(), (3,), (1,), (2, 1), (2, 3)])
def test_losses_that_are_not_one_a_record_are_refused(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="for 2 records"):
        engine_for(model)(2, lambda: model(torch.ones(2, 3)).sum() * torch.ones(shape))


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_first_axis_of_an_adapted_layer_that_is_no_multiple_of_the_records_is_refused(rows: int) -> None:
    model = adapted(BASES["mlp"]())
    with pytest.raises(RuntimeError, match=f"{rows} rows for 2 records"):
        engine_for(model)(2, lambda: model(torch.ones(rows, 7)).sum().expand(2))


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_first_axis_that_is_no_multiple_of_the_records_is_refused(rows: int) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match=f"{rows} rows for 2 records"):
        engine_for(model)(2, lambda: model(torch.ones(rows, 3)).sum().expand(2))


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs(), self.bias)


@pytest.mark.parametrize(
    "layer",
    [nn.GroupNorm(1, 3), nn.Conv2d(3, 3, 1), nn.Embedding(3, 3), OwnLinear(3, 3), nn.PReLU()],
    ids=lambda m: type(m).__name__,
)
def test_a_trainable_layer_without_a_rule_is_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(ConfigError, match=rf"1\.weight.*{type(layer).__name__}"):
        engine_for(nn.Sequential(nn.Linear(3, 3), layer))


def test_a_frozen_layer_of_any_kind_is_fine() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3).requires_grad_(False), OwnLinear(3, 3).requires_grad_(False))
    compare(model, lambda m, x: m(x).square().sum(1), torch.randn(RECORDS, 3, generator=generator()))
