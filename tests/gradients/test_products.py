"""Products with frozen weights by oneDNN: the same numbers and slopes as PyTorch's own, wherever it is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lalora_flwr.gradients.products import LEAST_STEP, SMALLEST, Kernels, filled_up, for_onednn

ONEDNN, TORCH = Kernels(frozenset({torch.float32})), Kernels(frozenset())


def close(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).norm() <= 1e-5 * (1 + wanted.norm()))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(96, 130),
    st.integers(96, 130),
    st.booleans(),
    st.integers(0, 9),
)
def test_the_same_layer_slopes_and_slopes_of_slopes(leading: list[int], inner: int, outer: int, bias: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, inner, generator=generator).requires_grad_()
    weight, b = torch.randn(outer, inner, generator=generator), torch.randn(outer, generator=generator) if bias else None
    assert ONEDNN.take(x, weight)
    results = []
    for kernels in (ONEDNN, TORCH):
        y = kernels.linear(x, weight, b)
        (slope,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.square().sum(), x)
        results.append((y, slope, second))
    for found, wanted in zip(*results, strict=True):
        assert close(found, wanted)
    assert close(ONEDNN.product(x.detach(), weight, b), results[1][0])
    transposed = torch.randn(inner, outer, generator=generator).t()
    assert close(ONEDNN.product(x.detach(), transposed), F.linear(x.detach(), transposed))


def test_rows_that_do_not_lie_together() -> None:
    rows, weight = torch.randn(100, 6).t(), torch.randn(95, 100)
    assert close(ONEDNN.product(rows, weight), F.linear(rows, weight))
    spread = torch.randn(1, 100).expand(5, 100)
    assert close(ONEDNN.linear(spread, weight), F.linear(spread, weight))


def test_a_bias_that_does_not_lie_together() -> None:
    rows, weight = torch.randn(3, 96), torch.randn(96, 96)
    for bias in (torch.randn(192)[::2], torch.randn(1).expand(96)):
        for product in (ONEDNN.product, ONEDNN.linear):
            assert close(product(rows, weight, bias), F.linear(rows, weight, bias))


@given(st.integers(1, 10**6))
def test_few_sizes_and_little_more_than_was_asked(rows: int) -> None:
    whole = filled_up(rows)
    assert rows <= whole <= max(rows + LEAST_STEP - 1, rows * 9 / 8) and filled_up(whole) == whole
    assert len({filled_up(n) for n in range(1024, 2048)}) <= 9


@pytest.mark.skipif(torch.bfloat16 not in for_onednn(), reason="this processor does not compute in bfloat16")
def test_bfloat16_is_computed_as_before() -> None:
    kernels = Kernels(frozenset({torch.bfloat16}))
    x, weight, bias = torch.randn(3, 137, 96), torch.randn(120, 96).bfloat16(), torch.randn(120).bfloat16()
    found, wanted = (value.bfloat16().requires_grad_() for value in (x, x))
    assert kernels.take(found, weight) and not kernels.take(x, weight.float())
    for y, z in ((kernels.linear(found, weight, bias), F.linear(wanted, weight, bias)),):
        assert y.dtype == torch.bfloat16 and torch.allclose(y, z, rtol=0.02, atol=0.1)
        slopes = torch.autograd.grad(y.float().sum(), found)[0], torch.autograd.grad(z.float().sum(), wanted)[0]
        assert torch.allclose(*slopes, rtol=0.02, atol=0.1)


def test_a_layers_output_can_be_changed_in_place() -> None:
    x, weight = torch.randn(3, 5, 96, requires_grad=True), torch.randn(96, 96)
    y = ONEDNN.linear(x, weight)
    assert y.is_contiguous() and not y._is_view()
    y[:, 0] += 1
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert close(slope, weight.sum(0).expand(3, 5, 96))


def test_left_to_pytorch() -> None:
    large, rows = torch.randn(96, 96), torch.randn(3, 96)
    assert large.numel() == SMALLEST and ONEDNN.take(rows, large) and not TORCH.take(rows, large)
    assert not ONEDNN.take(rows, large[:-1])
    assert not ONEDNN.take(rows[:0], large)
    assert not ONEDNN.take(rows.double(), large.double())
    assert not ONEDNN.take(rows.bfloat16(), large.bfloat16())
    assert not ONEDNN.take(rows.bfloat16(), large)
    assert not ONEDNN.take(rows.to("meta"), large.to("meta"))


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_trained_layer_gets_its_gradient(what: str) -> None:
    weight, bias, x = torch.randn(96, 96), torch.randn(96), torch.randn(3, 96)
    trained = (weight if what == "weight" else bias).requires_grad_()
    (found,) = torch.autograd.grad(ONEDNN.linear(x, weight, bias).square().sum(), trained)
    (wanted,) = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), trained)
    assert close(found, wanted)
