from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lalora_flwr.strategies import METHODS
from lalora_flwr.strategies.merge import MERGES, mean


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


def test_every_method_names_a_merge_that_exists() -> None:
    assert all(method.merge in MERGES for method in METHODS.values())
    assert MERGES["mean"] is mean
