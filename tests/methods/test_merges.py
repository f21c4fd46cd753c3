"""Merges of replies against naive ones, and the bound on one site's update."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lalora_flwr.adapter.slots import Layout
from lalora_flwr.methods.flexlora import PRODUCT_SVD, PRODUCT_SVD_SPLIT
from lalora_flwr.methods.hetlora import PER_ENTRY, ZERO_PADDED
from lalora_flwr.methods.merges import MEAN, MEDIAN, TRIMMED_MEAN, Memory, Merge, Now, bounded, num_cut
from lalora_flwr.methods.method import Method
from lalora_flwr.methods.updates import SumOnly, Tensors, Update, Updates, together
from lalora_flwr.settings import MergeSettings
from lalora_flwr.settings.choices import MERGES, METHODS


def merged_by(merge: Merge, replies: Sequence[Tensors], trim: float = 0.2) -> dict[str, NDArray[np.float32]]:
    updates = together([Update(site, tensors) for site, tensors in enumerate(replies)])
    made = merge({}, updates, Memory(), Now(1, Layout([]), MergeSettings(trim=trim), {}))
    assert made.memory == Memory() and not made.directive
    return dict(made.tensors)


def mean(replies: Sequence[Tensors]) -> dict[str, NDArray[np.float32]]:
    return merged_by(MEAN, replies)


def median(replies: Sequence[Tensors]) -> dict[str, NDArray[np.float32]]:
    return merged_by(MEDIAN, replies)


def trimmed_mean(replies: Sequence[Tensors], trim: float) -> dict[str, NDArray[np.float32]]:
    return merged_by(TRIMMED_MEAN, replies, trim)


def least_replies(merge: Merge, trim: float) -> int:
    return merge.least_updates(MergeSettings(trim=trim))


def replies(sites: int, shapes: dict[str, tuple[int, ...]], seed: int = 0) -> list[dict[str, NDArray[np.float32]]]:
    draw = np.random.default_rng(seed)
    return [{n: draw.standard_normal(s).astype(np.float32) for n, s in shapes.items()} for _ in range(sites)]


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 4), st.integers(1, 8), st.integers(0, 2**31))
def test_with_one_a_everywhere_the_mean_of_b_is_the_mean_of_the_products(
    sites: int, rows: int, rank: int, columns: int, seed: int
) -> None:
    """Exactness of FFA-LoRA and of RoLoRA's odd rounds: mean(B_i) A = mean(B_i A)."""
    a = np.random.default_rng(seed).standard_normal((rank, columns))
    sent = replies(sites, {"x.lora_B.weight": (rows, rank)}, seed)
    dense = sum(reply["x.lora_B.weight"].astype(np.float64) @ a for reply in sent) / sites
    merged = mean(sent)
    assert list(merged) == ["x.lora_B.weight"]
    np.testing.assert_allclose(merged["x.lora_B.weight"].astype(np.float64) @ a, dense, rtol=1e-5, atol=1e-5)


def test_with_one_b_everywhere_the_mean_of_a_is_the_mean_of_the_products() -> None:
    b = np.random.default_rng(1).standard_normal((6, 2))
    sent = replies(3, {"x.lora_A.weight": (2, 5)})
    dense = np.mean([b @ reply["x.lora_A.weight"].astype(np.float64) for reply in sent], axis=0)
    np.testing.assert_allclose(b @ mean(sent)["x.lora_A.weight"].astype(np.float64), dense, atol=1e-6)


def test_with_both_factors_the_product_of_the_means_is_not_the_mean_of_the_products() -> None:
    sent = replies(2, {"A": (2, 5), "B": (6, 2)})
    merged = mean(sent)
    dense = np.mean([reply["B"] @ reply["A"] for reply in sent], axis=0)
    assert np.abs(merged["B"] @ merged["A"] - dense).max() > 0.1


def test_every_site_has_the_same_weight() -> None:
    sent = [{"x": np.full((2, 3), v, np.float32)} for v in (1.0, 2.0, 9.0)]
    np.testing.assert_array_equal(mean(sent)["x"], np.full((2, 3), 4.0, np.float32))
    for order in ([0, 2, 1], [2, 1, 0]):
        np.testing.assert_array_equal(mean([sent[i] for i in order])["x"], mean(sent)["x"])


def test_each_tensor_is_merged_by_name_whatever_the_order_in_a_reply() -> None:
    sent = replies(3, {"p": (2, 2), "q": (2, 2)})
    turned = [sent[0], dict(reversed(sent[1].items())), sent[2]]
    for name in ("p", "q"):
        np.testing.assert_array_equal(mean(turned)[name], mean(sent)[name])
        np.testing.assert_allclose(mean(sent)[name], sum(r[name] for r in sent) / 3, rtol=1e-6)


def test_one_reply_is_returned_as_it_is_and_replies_are_not_changed() -> None:
    sent = replies(2, {"x": (3, 3)})
    before = [reply["x"].copy() for reply in sent]
    np.testing.assert_array_equal(mean(sent[:1])["x"], before[0])
    mean(sent)
    assert all(np.array_equal(reply["x"], b) for reply, b in zip(sent, before, strict=True))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_result_is_float32_and_the_sum_float64_whatever_arrives(dtype: type) -> None:
    values = [1.0, 1000.5, -999.5, 0.25] * 100
    merged = mean([{"x": np.full(2, v, dtype)} for v in values])["x"]
    assert merged.dtype == np.float32
    np.testing.assert_array_equal(merged, np.full(2, np.float32(np.mean(values))))


def test_large_values_that_cancel_leave_the_small_one() -> None:
    """In float32 1e8 + 1 is 1e8: the 1 would be lost."""
    merged = mean([{"x": np.array([v], np.float32)} for v in (1e8, 1.0, -1e8, 0.0)])["x"]
    assert merged[0] == 0.25


def test_float64_reference_by_torch() -> None:
    sent = replies(7, {"x": (4, 5)})
    want = torch.stack([torch.from_numpy(reply["x"]).double() for reply in sent]).mean(0).float()
    assert torch.equal(torch.from_numpy(mean(sent)["x"]), want)


def test_merges_are_registered_under_their_names() -> None:
    found = {name: MERGES.get(name, Merge) for name in MERGES.names() if not name.startswith("test-")}
    assert found == {
        "mean": MEAN,
        "median": MEDIAN,
        "trimmed-mean": TRIMMED_MEAN,
        "per-entry": PER_ENTRY,
        "zero-padded": ZERO_PADDED,
        "product-svd": PRODUCT_SVD,
        "product-svd-split": PRODUCT_SVD_SPLIT,
    }
    assert all(merge.name == name for name, merge in found.items())
    assert all(METHODS.get(name, Method).merge is MEAN for name in ("la-lora", "dp-lora", "ffa-lora", "rolora", "ridge-head"))


def test_the_mean_needs_no_single_update_and_the_others_say_that_they_do() -> None:
    hidden = Updates({"x": np.array([3.0, 9.0])}, 3)
    now = Now(1, Layout([]), MergeSettings(), {})
    assert not MEAN.needs_each and MEDIAN.needs_each and TRIMMED_MEAN.needs_each
    np.testing.assert_array_equal(MEAN({}, hidden, Memory(), now).tensors["x"], np.array([1.0, 3.0], np.float32))
    with pytest.raises(SumOnly):
        MEDIAN({}, hidden, Memory(), now)


# robust merges and the bound on an update

FINITE = st.floats(-1e4, 1e4, width=32)
VECTOR = st.lists(FINITE, min_size=3, max_size=3)
STACKS = st.integers(1, 9).flatmap(lambda sites: st.lists(VECTOR, min_size=sites, max_size=sites))


def as_replies(values: list[list[float]]) -> list[dict[str, NDArray[np.float32]]]:
    return [{"x": np.asarray(row[:2], np.float32), "y": np.asarray(row[2:], np.float32)} for row in values]


def flat(merged: Tensors) -> list[float]:
    return [float(v) for name in ("x", "y") for v in merged[name]]


MERGED: dict[str, Callable[[Sequence[Tensors]], Tensors]] = {
    "median": median,
    "trimmed-mean 0.2": lambda r: trimmed_mean(r, 0.2),
    "trimmed-mean 0.45": lambda r: trimmed_mean(r, 0.45),
}


def naive(name: str, column: list[float]) -> float:
    """One coordinate, by Python's own statistics and exact fractions."""
    if name == "median":
        return float(statistics.median(Fraction(v) for v in column))
    share = {"trimmed-mean 0.2": Fraction(1, 5), "trimmed-mean 0.45": Fraction(9, 20)}[name]
    cut = int(share * len(column))
    return float(statistics.mean(Fraction(v) for v in sorted(column)[cut : len(column) - cut]))


@given(values=STACKS, name=st.sampled_from(sorted(MERGED)))
def test_a_robust_merge_is_the_naive_one_of_each_coordinate(values: list[list[float]], name: str) -> None:
    sent = as_replies(values)
    want = [naive(name, [flat(reply)[i] for reply in sent]) for i in range(3)]
    merged = MERGED[name](sent)
    np.testing.assert_allclose(flat(merged), want, rtol=1e-6, atol=1e-9)
    assert {v.dtype for v in merged.values()} == {np.dtype(np.float32)} and list(merged) == ["x", "y"]


@given(values=STACKS, name=st.sampled_from(sorted(MERGED)), order=st.randoms())
def test_a_robust_merge_does_not_depend_on_the_order_of_the_replies(values: list[list[float]], name: str, order: Any) -> None:
    sent = as_replies(values)
    turned = list(sent)
    order.shuffle(turned)
    assert flat(MERGED[name](sent)) == flat(MERGED[name](turned))


@given(
    values=STACKS, name=st.sampled_from(sorted(MERGED)), lies=st.lists(FINITE, min_size=3, max_size=3), liars=st.integers(1, 4)
)
def test_a_few_liars_leave_a_robust_merge_between_the_honest_replies(
    values: list[list[float]], name: str, lies: list[float], liars: int
) -> None:
    sites = len(values) + liars
    assume(liars <= {"median": (sites - 1) // 2, "trimmed-mean 0.2": sites // 5, "trimmed-mean 0.45": sites * 9 // 20}[name])
    merged = flat(MERGED[name](as_replies(values + [lies] * liars)))
    truths = [flat(reply) for reply in as_replies(values)]
    for got, column in zip(merged, zip(*truths, strict=True), strict=True):
        assert min(column) <= got <= max(column)


@given(trim=st.floats(0.001, 0.5, exclude_max=True))
def test_the_fewest_replies_for_a_merge_are_those_that_cut_one_at_each_end(trim: float) -> None:
    needed = least_replies(TRIMMED_MEAN, trim)
    assert num_cut(needed, trim) >= 1 and needed > 2 * num_cut(needed, trim)
    assert num_cut(needed - 1, trim) == 0
    assert (least_replies(MEAN, trim), least_replies(MEDIAN, trim)) == (1, 3)


@pytest.mark.parametrize(
    ("sites", "trim", "cut"), [(10, 0.1, 1), (100, 0.29, 29), (9, 0.1, 0), (3, 0.49, 1), (7, 0.3, 2), (2, 0.5 - 1e-12, 0)]
)
def test_a_share_is_rounded_down_to_whole_replies(sites: int, trim: float, cut: int) -> None:
    assert num_cut(sites, trim) == cut


BOUND = st.floats(1e-30, 1e6)


@given(sent=VECTOR, reply=VECTOR, bound=BOUND)
def test_a_bounded_update_keeps_its_direction_and_is_no_longer_than_the_bound(
    sent: list[float], reply: list[float], bound: float
) -> None:
    (start,), (end,) = as_replies([sent]), as_replies([reply])
    kept, norm = bounded(end, start, bound)
    update = np.array(flat(end)) - np.array(flat(start))
    assert norm == pytest.approx(math.hypot(*update), rel=1e-12)
    moved = np.array([float(v) for n in ("x", "y") for v in kept[n]]) - np.array(flat(start))
    rounding = 1e-11  # of float64 at values up to 1e4
    assert math.hypot(*moved) <= bound * (1 + 1e-12) + rounding
    if norm <= bound:
        assert kept is end
    else:
        np.testing.assert_allclose(moved, update * (bound / norm), rtol=1e-9, atol=rounding)


@given(values=STACKS, sent=VECTOR, lie=VECTOR, bound=st.floats(1e-3, 1e3))
def test_a_bound_limits_what_one_site_does_to_the_mean(
    values: list[list[float]], sent: list[float], lie: list[float], bound: float
) -> None:
    (start,) = as_replies([sent])
    kept = [bounded(reply, start, bound)[0] for reply in as_replies(values)]
    (liar,) = as_replies([lie])
    with_liar = mean([*kept[1:], bounded(liar, start, bound)[0]])
    moved = math.dist(flat(mean(kept)), flat(with_liar))
    assert moved <= 2 * bound / len(values) + 1e-2  # float32 at values up to 1e4
