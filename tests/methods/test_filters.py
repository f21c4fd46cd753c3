"""Filters of gradients against plain convolutions: what they smooth, and what they leave alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lalora_flwr.adapter.slots import HEAD, LORA_A, LORA_B, Slot
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.adaptive import WIDTHS
from lalora_flwr.methods.filters import NONE, Around, Filter, filter_of
from lalora_flwr.methods.smoothing import GAUSS5, GAUSS5_PERMUTED, own_share, smooth_rows
from lalora_flwr.settings import settings_from
from lalora_flwr.settings.choices import FILTERS
from tests.algorithm1 import smooth
from tests.reference import generator

A, B = Slot("a", "m", LORA_A, (), 1), Slot("b", "m", LORA_B, (), 0)
HEADS = [Slot("weight", "head", HEAD, ()), Slot("bias", "head", HEAD, ())]


def gauss5(slot: Slot, gradient: Tensor) -> Tensor:
    return GAUSS5(slot, gradient, {}, Around())


def gauss5_permuted(slot: Slot, gradient: Tensor) -> Tensor:
    return GAUSS5_PERMUTED(slot, gradient, {}, Around())


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


def test_filter_none_changes_nothing_and_every_filter_has_its_name() -> None:
    x = random(3, 5)
    assert all(torch.equal(NONE(slot, x, {}, Around()), x) for slot in (A, B, *HEADS))
    assert all(FILTERS.get(name, Filter).name == name for name in FILTERS.names())
    assert (filter_of("none"), filter_of("gauss5"), filter_of("gauss5-permuted")) == (NONE, GAUSS5, GAUSS5_PERMUTED)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(1, 40), st.integers(0, 2**31), st.booleans())
def test_any_width_is_a_convolution_with_its_binomial(half: int, features: int, seed: int, permuted: bool) -> None:
    width, x = 2 * half + 1, random(2, features, seed=seed)
    filter = filter_of(f"gauss-permuted:{width}" if permuted else f"gauss:{width}")
    order = torch.randperm(features, generator=generator(features)) if permuted else torch.arange(features)
    rows = x[:, order].numpy()
    taps = np.poly1d([0.5, 0.5]) ** (width - 1)  # ((1 + z) / 2)^(W - 1)
    want = torch.empty_like(x)
    padded = [np.pad(row, half, mode="symmetric") for row in rows]
    want[:, order] = torch.from_numpy(np.stack([np.convolve(row, taps.coeffs, mode="valid") for row in padded]))
    torch.testing.assert_close(filter(A, x, {}, Around()), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(filter(B, x.T.contiguous(), {}, Around()).T, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [3, 5, 17, 255])
def test_any_width_keeps_constants_and_its_share_of_white_noise(width: int) -> None:
    for kind in ("gauss", "gauss-permuted"):
        filter = filter_of(f"{kind}:{width}")
        for features in (1, 2, 4, 300):
            x = torch.full((2, features), 2.5, dtype=torch.float64)
            torch.testing.assert_close(filter(A, x, {}, Around()), x, rtol=1e-12, atol=0)
        noise = random(40, 6_000)
        left = filter(A, noise, {}, Around()).var() / noise.var()
        assert float(left) == pytest.approx(filter.keeps, rel=0.03)
        assert filter.kept(A) == filter.kept(B) == filter.keeps and filter.kept(HEADS[0]) == 1.0


def test_five_taps_are_the_papers_filter() -> None:
    x = torch.randn(4, 30, generator=generator())
    for name in ("gauss", "gauss-permuted"):
        one, other = filter_of(f"{name}:5"), filter_of(f"{name.replace('gauss', 'gauss5')}")
        assert torch.equal(one(A, x, {}, Around()), other(A, x, {}, Around())) and one.keeps == other.keeps


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 50), st.sampled_from(WIDTHS))
def test_the_trace_is_that_of_the_smoothing_matrix(features: int, width: int) -> None:
    matrix = smooth_rows(torch.eye(features, dtype=torch.float64), width) if width > 1 else torch.eye(features)
    assert own_share(features, width) == pytest.approx(float(matrix.trace()), abs=1e-9)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gauss", "gauss:<width> with an odd width from 3 to 255"),
        ("gauss:4", "gauss:<width> with an odd width"),
        ("gauss:05", "gauss:<width>"),
        ("gauss:257", "gauss:<width>"),
        ("gauss-permuted:-5", "gauss-permuted:<width>"),
        ("gauss5:7", "gauss5, with nothing behind a colon"),
        ("wiener:1", "wiener, with nothing behind a colon"),
        ("doppler:1.0", "doppler, or with a number between 0 and 1, both excluded, as doppler:0.9"),
        ("disk:0.0", "disk, or with a number between 0 and 1"),
        ("disk:nan", "disk, or with a number between 0 and 1"),
        ("gaus5", "one of auto, none, gauss5, .*; did you mean gauss5?"),
    ],
)
def test_a_wrong_name_says_what_is_allowed(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"filter\.name = '{name}': must be {reason}"):
        settings_from({"filter.name": name})
