"""Per-record gradients are those of single records, for layers of any shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lalora_flwr.models.base import BaseModel
from tests.adapters import engine_for, set_active
from tests.gradients.layers import RECORDS, compare
from tests.reference import (
    BASES,
    adapted,
    assert_same_gradients,
    double_pair,
    generator,
    move_off_zero,
    one_by_one,
    records_for,
)


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("factors", ["A", "B", "AB"])
@pytest.mark.parametrize("kind", ["mlp", "vit", "swin"])
def test_adapter_gradients_are_those_of_single_records(kind: str, factors: str, head: str) -> None:
    base = BASES[kind]()
    model = adapted(base, head=head)
    move_off_zero(model)
    data = records_for(base, RECORDS)
    model, plain = double_pair(model)
    engine = engine_for(model)
    active = set_active(model, frozenset(factors))
    set_active(plain, frozenset(factors))
    inputs = data.inputs.double()

    fast = engine(RECORDS, lambda: base.losses(model, inputs, data.labels))
    slow = one_by_one(plain, lambda m, j: base.losses(m, inputs[j : j + 1], data.labels[j : j + 1]).sum(), RECORDS)

    assert list(fast) == list(active)
    assert_same_gradients(fast, slow)
    assert any("modules_to_save" in name for name in fast) == (head == "trained")
    assert all(float(g.abs().max()) > 0 for g in fast.values())


def test_one_engine_follows_the_active_factors() -> None:
    base = BASES["vit"]()
    model = adapted(base)
    move_off_zero(model)
    data = records_for(base, RECORDS)
    model, plain = double_pair(model)
    engine = engine_for(model)
    inputs = data.inputs.double()
    for factors in ("B", "A", "AB", "B"):
        set_active(model, frozenset(factors))
        set_active(plain, frozenset(factors))
        fast = engine(RECORDS, lambda: base.losses(model, inputs, data.labels))
        slow = one_by_one(plain, lambda m, j: base.losses(m, inputs[j : j + 1], data.labels[j : j + 1]).sum(), RECORDS)
        assert_same_gradients(fast, slow)


class Windows(nn.Module):
    """Low rank, with a bias; the windows of a record lie next to each other in the first axis, as in Swin."""

    def __init__(self, features: int, rank: int, out: int, windows: int, seed: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(features, rank, bias=False), nn.Linear(rank, out)
        self.windows = windows
        draw = generator(seed)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=draw))

    def forward(self, x: Tensor) -> Tensor:  # (records, windows, *tokens, features)
        folded = x.reshape(x.shape[0] * self.windows, *x.shape[2:])
        y = self.up(torch.tanh(self.down(folded)))
        return y.reshape(x.shape[0], self.windows, *y.shape[1:])


SHAPES = {
    "records": st.integers(1, 5),
    "windows": st.integers(1, 4),
    "tokens": st.lists(st.integers(1, 4), max_size=2),
    "features": st.integers(1, 6),
    "rank": st.integers(1, 4),
    "out": st.integers(1, 6),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=80, deadline=None)
@given(**SHAPES, frozen=st.sampled_from(["", "down.weight", "up.weight", "up.bias"]))
def test_linear_layers_of_any_shape_rank_batch_and_number_of_windows(
    records: int, windows: int, tokens: list[int], features: int, rank: int, out: int, seed: int, frozen: str
) -> None:
    model = Windows(features, rank, out, windows, seed)
    for name, p in model.named_parameters():
        p.requires_grad_(name != frozen)
    x = torch.randn(records, windows, *tokens, features, generator=generator(seed))
    compare(model, lambda m, x: m(x).sin().flatten(1).sum(1), x)


@settings(max_examples=60, deadline=None)
@given(**SHAPES, factors=st.sampled_from(["A", "B", "AB"]))
def test_adapters_of_any_shape_rank_batch_and_number_of_windows(
    records: int, windows: int, tokens: list[int], features: int, rank: int, out: int, seed: int, factors: str
) -> None:
    base = BaseModel("test/windows", Windows(features, 5, out, windows, seed), "", ("down", "up"), (), 1)
    model = adapted(base, rank=min(rank, max(min(features, 5), min(5, out))))  # not above both layers
    move_off_zero(model)
    set_active(model, frozenset(factors))
    x = torch.randn(records, windows, *tokens, features, generator=generator(seed))
    compare(model, lambda m, x: m(x).sin().flatten(1).sum(1), x)


@settings(max_examples=40, deadline=None)
@given(
    records=st.integers(1, 4),
    axes=st.lists(st.integers(1, 4), max_size=2),
    features=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_inputs_of_two_three_and_four_axes(records: int, axes: list[int], features: int, seed: int) -> None:
    x = torch.randn(records, *axes, features, generator=generator(seed))
    compare(nn.Sequential(nn.Linear(features, 3)), lambda m, x: m(x).square().flatten(1).sum(1), x)


@pytest.mark.parametrize("factors", ["A", "B", "AB"])
def test_inputs_and_output_gradients_that_are_not_contiguous(factors: str) -> None:
    base = BaseModel("test/windows", Windows(3, 5, 2, 4, seed=0), "", ("down", "up"), (), 1)
    model = adapted(base)
    move_off_zero(model)
    set_active(model, frozenset(factors))
    x = torch.randn(3, 2, 4, RECORDS, generator=generator()).permute(3, 2, 1, 0)  # (records, windows, tokens, features)
    compare(model, lambda m, x: m(x).permute(0, 3, 1, 2).flatten(1).sum(1), x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


def test_gradients_of_a_layer_called_twice_add_up() -> None:
    compare(Twice(), lambda m, x: m(x).square().sum(1), torch.randn(RECORDS, 4, generator=generator()))


@pytest.mark.parametrize("factors", ["A", "B", "AB"])
def test_gradients_of_an_adapted_layer_called_twice_add_up(factors: str) -> None:
    model = adapted(BaseModel("test/twice", Twice(), "", ("layer",), (4,), 4))
    move_off_zero(model)
    set_active(model, frozenset(factors))
    compare(model, lambda m, x: m(x).square().sum(1), torch.randn(RECORDS, 4, generator=generator()))
