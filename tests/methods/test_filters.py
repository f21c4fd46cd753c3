"""Filters of gradients against plain convolutions: what they smooth, and what they leave alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lalora_flwr.adapter.slots import HEAD, LORA_A, LORA_B, Slot
from lalora_flwr.methods.filters import GAUSS5, GAUSS5_PERMUTED, NONE, Filter
from lalora_flwr.settings.choices import FILTERS
from tests.algorithm1 import smooth
from tests.reference import generator

A, B = Slot("a", "m", LORA_A, (), 1), Slot("b", "m", LORA_B, (), 0)
HEADS = [Slot("weight", "head", HEAD, ()), Slot("bias", "head", HEAD, ())]


def gauss5(slot: Slot, gradient: Tensor) -> Tensor:
    return GAUSS5(slot, gradient, {})


def gauss5_permuted(slot: Slot, gradient: Tensor) -> Tensor:
    return GAUSS5_PERMUTED(slot, gradient, {})


def padded_convolution(x: np.ndarray) -> np.ndarray:
    """Rows convolved by numpy, after its own 'symmetric' padding."""
    rows = [np.convolve(np.pad(row, 2, mode="symmetric"), np.array([1, 4, 6, 4, 1]) / 16, mode="valid") for row in x]
    return np.stack(rows)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("features", [1, 2, 3, 4, 5, 6, 17])
def test_both_references_agree(features: int) -> None:
    x = random(3, features).numpy()
    np.testing.assert_allclose(padded_convolution(x), np.stack([smooth(row) for row in x]), atol=1e-15)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31))
def test_a_is_smoothed_along_its_inputs_and_b_along_its_outputs(rank: int, features: int, seed: int) -> None:
    x = random(rank, features, seed=seed)
    want = torch.from_numpy(np.stack([smooth(row) for row in x.numpy()]))
    torch.testing.assert_close(gauss5(A, x), want, rtol=0, atol=1e-14)
    torch.testing.assert_close(gauss5(B, x.T.contiguous()), want.T, rtol=0, atol=1e-14)


def test_a_known_signal() -> None:
    x = torch.tensor([[16.0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 16.0, 0, 0, 0]])
    want = torch.tensor([[10.0, 5, 1, 0, 0, 0, 0], [0, 1, 4, 6, 4, 1, 0]])  # the edge is repeated: 6 + 4, 4 + 1, 1
    assert torch.equal(gauss5(A, x), want)
    assert torch.equal(gauss5(B, x.T), want.T)


def test_ranks_are_not_mixed() -> None:
    x = random(4, 9)
    for row in range(4):
        y = x.clone()
        y[row, 3] += 1.0
        others = [r for r in range(4) if r != row]
        moved_a, moved_b = gauss5(A, y) - gauss5(A, x), (gauss5(B, y.T) - gauss5(B, x.T)).T
        for moved in (moved_a, moved_b):
            assert not moved[others].any()
            assert float(moved[row].abs().max()) > 0.3


@pytest.mark.parametrize("features", [1, 2, 3, 4, 5, 50])
def test_a_constant_stays_constant(features: int) -> None:
    x = torch.full((3, features), 2.5, dtype=torch.float64)
    torch.testing.assert_close(gauss5(A, x), x, rtol=1e-14, atol=0)
    torch.testing.assert_close(gauss5(B, x.T), x.T, rtol=1e-14, atol=0)


def test_the_filter_keeps_the_sum_of_the_features() -> None:
    x = random(3, 23)
    torch.testing.assert_close(gauss5(A, x).sum(1), x.sum(1))


def test_white_noise_keeps_seventy_parts_in_256_of_its_variance() -> None:
    for name, x in ((A, random(8, 20_000)), (B, random(20_000, 8))):
        assert float(gauss5(name, x).std() / x.std()) == pytest.approx((70 / 256) ** 0.5, rel=0.01)


@pytest.mark.parametrize("features", [1, 7, 40])
def test_the_control_smooths_in_another_order_of_the_features(features: int) -> None:
    x = random(3, features)
    one = torch.eye(features, dtype=torch.float64)
    kernel = gauss5_permuted(A, one)  # row i: where a value of feature i goes
    order = torch.randperm(features, generator=generator(features))
    torch.testing.assert_close(kernel[order][:, order], gauss5(A, one))
    torch.testing.assert_close(gauss5_permuted(A, x), x @ kernel)
    torch.testing.assert_close(gauss5_permuted(B, x.T.contiguous()).T, x @ kernel)
    if features == 40:
        assert not torch.allclose(kernel, gauss5(A, one))
    assert all(torch.equal(gauss5_permuted(name, x), x) for name in HEADS)


@pytest.mark.parametrize("name", HEADS, ids=lambda slot: slot.name)
def test_a_head_keeps_its_gradient(name: Slot) -> None:
    for x in (random(3, 9), random(9)):
        assert torch.equal(gauss5(name, x), x)


@pytest.mark.parametrize("name", [A, B], ids=lambda slot: slot.name)
def test_shape_type_and_input_are_kept(name: Slot) -> None:
    x = torch.randn(4, 6, generator=generator())
    before = x.clone()
    y = gauss5(name, x)
    assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous()
    assert torch.equal(x, before)


def test_filter_none_changes_nothing_and_gauss5_is_registered() -> None:
    x = random(3, 5)
    assert all(torch.equal(NONE(slot, x, {}), x) for slot in (A, B, *HEADS))
    found = {name: FILTERS.get(name, Filter) for name in FILTERS.names()}
    assert found == {"none": NONE, "gauss5": GAUSS5, "gauss5-permuted": GAUSS5_PERMUTED}
    assert all(own.name == name and not own.remembers for name, own in found.items())
