"""The bound on what a record adds: at every scale, in every precision, over all tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lalora_flwr.adapter.slots import LORA_A
from lalora_flwr.privacy import clip as clipping
from lalora_flwr.privacy.clip import clip
from lalora_flwr.privacy.mechanism import LARGEST, SMALLEST, Mechanism
from lalora_flwr.privacy.noise import mechanism_for
from tests.conftest import small
from tests.privacy.sums import SHAPES, gradients
from tests.reference import generator, joint_norm

SIZES = [0.0, 1e-42, 1e-30, 1e-12, 1e-3, 0.999, 1.0, 7.0, 1e6, 1e18, 1e25, 1e38, math.inf, -math.inf, math.nan]


BOUNDS = st.floats(SMALLEST, LARGEST, width=32)  # every C that float32 can hold


def record(per_sample: Mapping[str, Tensor], j: int) -> dict[str, Tensor]:
    return {name: g[j : j + 1] for name, g in per_sample.items()}


SIZE_ROWS = st.lists(st.lists(st.sampled_from(SIZES), min_size=3, max_size=3), max_size=6)


GAMMAS = st.sampled_from([0.0, 1e-9, 0.01, 1.0])


@settings(max_examples=150, deadline=None)
@given(SIZE_ROWS, BOUNDS, GAMMAS, st.integers(0, 2**31))
def test_no_record_contributes_more_than_c_over_all_tensors(
    sizes: list[list[float]], bound: float, gamma: float, seed: int
) -> None:
    per_sample = gradients(sizes, seed)
    for j in range(len(sizes)):
        alone, _ = clip(record(per_sample, j), bound, gamma)
        assert all(t.isfinite().all() for t in alone.values())
        assert largest_over(alone, bound) <= 1 + 1e-9


@settings(max_examples=150, deadline=None)
@given(SIZE_ROWS, BOUNDS, st.sampled_from(["lora_A", "lora_B", "head", "x", "lora", ""]), st.integers(0, 2**31))
def test_nor_does_one_that_is_clipped_in_two_parts(sizes: list[list[float]], bound: float, apart: str, seed: int) -> None:
    mechanism = Mechanism(1.0, bound, 1.0, 1.0, apart=apart)
    groups = mechanism.bounds(SHAPES)
    assert sorted(name for names, _ in groups for name in names) == sorted(SHAPES)
    assert len(groups) == (2 if apart in ("lora_A", "lora_B", "head", "x") else 1)
    assert math.hypot(*(own / bound for _, own in groups)) == pytest.approx(1, abs=1e-12)
    per_sample = gradients(sizes, seed)
    for j in range(len(sizes)):
        one = record(per_sample, j)
        whole = {n: v for names, own in groups for n, v in clip({name: one[name] for name in names}, own)[0].items()}
        assert largest_over(whole, bound) <= 1 + 1e-9


def test_what_is_clipped_apart_is_told_by_its_name(tmp_path: Path) -> None:
    mechanism = Mechanism(2.0, 3.0, 1.0, 1.0, apart="lora_A")
    assert mechanism.bounds(["b.lora_B.w", "a.lora_A.w", "head.weight"]) == [
        (["a.lora_A.w"], pytest.approx(0.44 * 3)),
        (["b.lora_B.w", "head.weight"], pytest.approx(math.sqrt(1 - 0.44**2) * 3)),
    ]
    assert mechanism.bounds(["a.lora_A.w"]) == [(["a.lora_A.w"], 3.0)]
    assert mechanism.bounds(["my_lora_A.w"]) == [(["my_lora_A.w"], 3.0)]
    assert dataclasses.replace(mechanism, noise_multiplier=0).bounds(["a.lora_A.w", "b.w"]) == [(["a.lora_A.w", "b.w"], math.inf)]
    assert mechanism_for(small(tmp_path, privacy__clipping="apart"), 100).apart == LORA_A
    assert not mechanism_for(small(tmp_path), 100).apart


@settings(max_examples=150, deadline=None)
@given(SIZE_ROWS.filter(bool), BOUNDS, GAMMAS, st.integers(0, 2**31), st.data())
def test_neighbours_differ_by_at_most_c(
    sizes: list[list[float]], bound: float, gamma: float, seed: int, data: st.DataObject
) -> None:
    per_sample = gradients(sizes, seed)
    gone = data.draw(st.integers(0, len(sizes) - 1))
    rest = {name: torch.cat([g[:gone], g[gone + 1 :]]) for name, g in per_sample.items()}
    with_it, without_it = clip(per_sample, bound, gamma)[0], clip(rest, bound, gamma)[0]
    assert largest_over({n: with_it[n] - without_it[n] for n in SHAPES}, bound) <= 1 + 1e-9


@settings(max_examples=100, deadline=None)
@given(SIZE_ROWS, BOUNDS, GAMMAS, st.integers(0, 2**31))
def test_the_sum_is_that_of_the_records_one_by_one(sizes: list[list[float]], bound: float, gamma: float, seed: int) -> None:
    per_sample = gradients(sizes, seed)
    sums, not_finite = clip(per_sample, bound, gamma)
    want = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    expected_bad = 0
    for j in range(len(sizes)):
        one = record(per_sample, j)
        norm = joint_norm(one)
        if not math.isfinite(norm):
            expected_bad += 1
            continue
        for name in SHAPES:
            want[name] += one[name][0].double() * (bound / (norm + gamma) if gamma else min(1.0, bound / norm if norm else 1.0))
    assert not_finite == expected_bad
    for name in SHAPES:
        assert sums[name].shape == SHAPES[name] and sums[name].dtype == torch.float64
        torch.testing.assert_close(sums[name], want[name], rtol=1e-9, atol=1e-9 * bound)


def test_auto_s_normalises_small_gradients_too() -> None:
    """By hand: norms 13 and 0.01 at C = 2, γ = 0.01."""
    large, small = gradients([[3.0, 4.0, 12.0]]), gradients([[0.01, 0.0, 0.0]])
    assert joint_norm(clip(large, 2.0, 0.01)[0]) == pytest.approx(2 * 13 / 13.01, rel=1e-6)
    assert joint_norm(clip(small, 2.0, 0.01)[0]) == pytest.approx(1.0, rel=1e-6)


def test_a_large_gradient_keeps_the_bound() -> None:
    """More entries than are float64 at once."""
    g = {"x": torch.randn(2, 3_000_000, generator=generator()).abs()}
    assert joint_norm(clip(record(g, 0), 1.0)[0]) == pytest.approx(1, abs=1e-9)
    both, alone = clip(g, 1.0)[0], [clip(record(g, j), 1.0)[0]["x"] for j in (0, 1)]
    torch.testing.assert_close(both["x"], alone[0] + alone[1])


SCALES = [1e-45, 1e-42, 1e-38, 1e-30, 2.6e-23, 1e-20, 1e-12, 1e-6, 1.0, 1e6, 1e12, 1e19, 1e25, 1e38]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tensors", [1, 40])
def test_the_bound_holds_at_every_scale_of_c_and_of_the_gradients(dtype: torch.dtype, tensors: int) -> None:
    """C from the smallest to the largest float32, entries from 1e-45 to 1e38: in float32 squares below 2.6e-23 vanished."""
    for scale in SCALES:
        g = {str(i): (torch.randn(3, 50, generator=generator(i)).double() * scale).to(dtype) for i in range(tensors)}
        size = joint_norm(record(g, 0))
        for bound in [SMALLEST, *SCALES, LARGEST]:
            alone, dropped = clip(record(g, 0), bound)
            moved = largest_over(alone, bound)
            assert moved <= 1 + 1e-9, (scale, bound)
            assert largest_over(clip(record(g, 0), bound, 0.01)[0], bound) <= 1 + 1e-9, (scale, bound)
            if math.isfinite(size) and not dropped:  # and it is no smaller than it should be
                assert moved == pytest.approx(min(1.0, size / bound), rel=1e-9)


def largest_over(tensors: Mapping[str, Tensor], bound: float) -> float:
    """The joint norm in units of ``bound``; divided first, since the square of a tiny C is no float64."""
    return joint_norm({n: t.double() / bound for n, t in tensors.items()})


def test_a_norm_that_underflows_lets_nothing_through() -> None:
    """Only float64 gradients can be so small; with a factor of 1 they would pass without a clip."""
    tiny = {"x": torch.full((1, 9), 1e-170, dtype=torch.float64)}
    assert not clip(tiny, 1.0)[0]["x"].any()


def test_a_record_below_c_is_unchanged() -> None:
    per_sample = gradients([[0.3, 0.2, 0.1]])
    sums, not_finite = clip(per_sample, 1.0)
    assert all(torch.equal(sums[n], per_sample[n][0]) for n in SHAPES)
    assert not_finite == 0


def test_a_record_above_c_keeps_its_direction_and_gets_norm_c() -> None:
    per_sample = gradients([[3.0, 4.0, 12.0]])  # joint norm 13
    sums, _ = clip(per_sample, 1.3)
    for n in SHAPES:
        torch.testing.assert_close(sums[n], per_sample[n][0].double() / 10, rtol=1e-6, atol=0)


def test_clip_is_per_record_not_per_batch() -> None:
    """Ten equal records of norm 1 sum to norm 10 at C = 1; two opposite ones of norm 5 cancel, however large."""
    one = gradients([[1.0, 0.0, 0.0]])
    ten = {n: g.expand(10, *g.shape[1:]) for n, g in one.items()}
    assert joint_norm(clip(ten, 1.0)[0]) == pytest.approx(10.0, rel=1e-5)
    loud = {n: torch.cat([5 * g, -0.1 * g]) for n, g in one.items()}  # batch sum has norm 4.9, clipped sum 1 - 0.1
    assert joint_norm(clip(loud, 1.0)[0]) == pytest.approx(0.9, rel=1e-5)


def test_clip_is_joint_not_per_tensor() -> None:
    """Three tensors of norm 1 each: a clip by tensor would let √3 through."""
    sums, _ = clip(gradients([[1.0, 1.0, 1.0]]), 1.0)
    assert joint_norm(sums) == pytest.approx(1.0, rel=1e-6)
    for t in sums.values():
        assert joint_norm({"t": t}) == pytest.approx(3**-0.5, rel=1e-5)


@pytest.mark.parametrize("size", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tensor", range(3))
def test_a_record_that_is_not_finite_in_any_tensor_adds_zero_and_is_counted(size: float, tensor: int) -> None:
    bad = [0.1, 0.1, 0.1]
    bad[tensor] = size
    good = gradients([[0.2, 0.2, 0.2], bad, [0.3, 0.1, 0.1]])
    sums, not_finite = clip(good, 1.0)
    want, _ = clip({n: g[[0, 2]] for n, g in good.items()}, 1.0)
    assert not_finite == 1
    for n in SHAPES:
        torch.testing.assert_close(sums[n], want[n])
    assert not clip(record(good, 1), 1.0)[0]["head.bias"].any()


def test_zero_gradients_and_no_records_sum_to_zero() -> None:
    for per_sample in (gradients([[0.0, 0.0, 0.0]] * 4), gradients([])):
        sums, not_finite = clip(per_sample, 1.0)
        assert not_finite == 0
        assert {n: tuple(t.shape) for n, t in sums.items()} == SHAPES
        assert not any(t.any() for t in sums.values())


def test_without_a_bound_only_records_that_are_not_finite_are_dropped() -> None:
    per_sample = gradients([[1e6, 1.0, 1.0], [math.nan, 1.0, 1.0], [0.0, 0.0, 0.0]])
    sums, not_finite = clip(per_sample, math.inf)
    assert not_finite == 1
    for n in SHAPES:
        assert torch.equal(sums[n], per_sample[n][0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_float_types_are_summed_in_float64_within_c(dtype: torch.dtype) -> None:
    per_sample = {n: g.to(dtype) for n, g in gradients([[300.0, 40.0, 5.0]]).items()}
    sums, _ = clip(per_sample, 1.0)
    assert all(t.dtype == torch.float64 for t in sums.values())
    assert joint_norm(sums) == pytest.approx(1.0, rel=1e-9)


def test_one_block_and_several_have_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    per_sample = {name: torch.randn(5, *shape, generator=generator(3)) for name, shape in SHAPES.items()}
    whole, _ = clip(per_sample, 1.0)
    monkeypatch.setattr(clipping, "SMALL", 0)
    monkeypatch.setattr(clipping, "BLOCK", 16)
    for name, value in clip(per_sample, 1.0)[0].items():
        torch.testing.assert_close(value, whole[name], rtol=1e-14, atol=1e-15)
