"""Sites that differ: profiles, and HetLoRA, FlexLoRA and HLoRA against literal loops over the papers' formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lalora_flwr.adapter.slots import LORA_A, LORA_B, Layout, Slot, factors_of
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.flexlora import PRODUCT_SVD, PRODUCT_SVD_SPLIT, merged_factors
from lalora_flwr.methods.hetlora import PER_ENTRY, ZERO_PADDED
from lalora_flwr.methods.merges import Memory, Merge, Now
from lalora_flwr.methods.parts import PARTS
from lalora_flwr.methods.updates import Update, together
from lalora_flwr.settings.schema import MergeSettings
from lalora_flwr.wire.profile import Profile
from tests.conftest import MODELS, Finished, arrays_of, small

RANK, M, N = 4, 5, 6
LAYERS = ("first", "second", "third")
LAYOUT = Layout(
    [
        *(Slot(f"{layer}.A", layer, LORA_A, (RANK, N)) for layer in LAYERS),
        *(Slot(f"{layer}.B", layer, LORA_B, (M, RANK)) for layer in LAYERS),
        Slot("head", "head", "head", (3,)),
    ]
)
PROFILES = "rank=4;rank=2 layers=2;rank=1"
words = st.tuples(st.none() | st.integers(1, 6), st.none() | st.integers(1, 4)).map(
    lambda part: " ".join(f"{name}={value}" for name, value in zip(("rank", "layers"), part, strict=True) if value)
)


def drawn(profiles: list[str], seed: int) -> tuple[dict[str, Any], list[Update]]:
    """The run's adapter, and what sites of these profiles send after a round in which they trained all they may."""
    draw = np.random.default_rng(seed)
    current = {name: draw.normal(size=slot.shape).astype(np.float32) for name, slot in LAYOUT.items()}
    updates = []
    for site, own in enumerate(profiles):
        held = PARTS.held(LAYOUT, Profile(site, own))
        trained = PARTS.trains(held, Profile(site, own))
        updates.append(Update(site, {name: draw.normal(size=held[name].shape).astype(np.float32) for name in sorted(trained)}))
    return current, updates


def merged(merge: Merge, current: dict[str, Any], updates: list[Update]) -> dict[str, Any]:
    result = merge(current, together(updates), Memory(), Now(1, LAYOUT, MergeSettings(), {}))
    return {**current, **result.tensors}


@given(st.lists(words, min_size=1, max_size=4), st.integers(0, 10**6))
def test_every_entry_is_divided_by_the_sites_that_trained_it(profiles: list[str], seed: int) -> None:
    current, updates = drawn(profiles, seed)
    new, padded = merged(PER_ENTRY, current, updates), merged(ZERO_PADDED, current, updates)
    for name, slot in LAYOUT.items():
        senders = [update.tensors[name] for update in updates if name in update.tensors]
        for index in np.ndindex(*slot.shape):
            values = [float(sent[index]) for sent in senders if all(i < size for i, size in zip(index, sent.shape, strict=True))]
            assert new[name][index] == pytest.approx(sum(values) / len(values) if values else current[name][index], abs=1e-6)
            expected = sum(values) / len(senders) if senders else current[name][index]
            assert padded[name][index] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("merge", [PRODUCT_SVD, PRODUCT_SVD_SPLIT])
@given(st.lists(words, min_size=1, max_size=4), st.integers(0, 10**6))
def test_the_mean_of_products_is_cut_as_its_dense_matrix_would_be(merge: Merge, profiles: list[str], seed: int) -> None:
    current, updates = drawn(profiles, seed)
    new = merged(merge, current, updates)
    for A, B in factors_of(LAYOUT):
        products = [u.tensors[B].astype(float) @ u.tensors[A].astype(float) for u in updates if A in u.tensors]
        if not products:
            assert np.array_equal(new[A], current[A]) and np.array_equal(new[B], current[B])
            continue
        U, S, W = np.linalg.svd(np.mean(products, axis=0))
        for rank in range(1, RANK + 1):  # whatever a site holds is the best that it can
            best = (U[:, :rank] * S[:rank]) @ W[:rank]
            np.testing.assert_allclose(new[B][:, :rank] @ new[A][:rank], best, atol=1e-4)
        kept = [k for k in range(RANK) if S[k] > 1e-6 * S[0]]
        lengths = np.sqrt(S[kept]) if merge is PRODUCT_SVD_SPLIT else np.ones(len(kept))
        np.testing.assert_allclose(np.linalg.norm(new[A][kept], axis=1), lengths, rtol=1e-4)
        rest = [k for k in range(RANK) if k not in kept]
        assert np.array_equal(new[A][rest], current[A][rest]) and not new[B][:, rest].any()
    np.testing.assert_allclose(new["head"], np.mean([u.tensors["head"] for u in updates], axis=0), atol=1e-6)


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_a_factor_that_was_frozen_is_the_runs(frozen: str) -> None:
    current, updates = drawn(["", "rank=2"], 0)
    one = [Update(u.site, {name: v for name, v in u.tensors.items() if not name.endswith(f".{frozen}")}) for u in updates]
    new = merged(PRODUCT_SVD, current, one)
    A, B = ([u.tensors.get(f"first.{factor}", current[f"first.{factor}"]).astype(float) for u in one] for factor in "AB")
    expected = (B[0] @ A[0] + B[1][:, :2] @ A[1][:2]) / 2
    U, S, W = np.linalg.svd(expected)
    np.testing.assert_allclose(new["first.B"] @ new["first.A"], (U[:, :RANK] * S[:RANK]) @ W[:RANK], atol=1e-4)


def test_sites_that_send_zeros_leave_an_adapter_that_can_train() -> None:
    last = np.ones((RANK, N))
    A, B = merged_factors([(np.zeros((2, N)), np.zeros((M, 2)))], last, split=True)
    assert np.array_equal(A, last) and not B.any()


def test_a_site_without_a_profile_holds_and_trains_everything() -> None:
    assert PARTS.held(LAYOUT, Profile(0)) == LAYOUT and PARTS.trains(LAYOUT, Profile(0)) == LAYOUT.names
    assert PARTS.held(LAYOUT, Profile(0, "rank=99 layers=99")) == LAYOUT
    assert PARTS.trains(LAYOUT, Profile(0, "layers=1")) == {"third.A", "third.B", "head"}


@pytest.mark.parametrize(
    "wrong",
    [
        *("rank=0", "rank=-1", "rank=2.5", "rank", "rnk=2", "rank=2 rank=3", "rank=2,layers=1", "rank=²", "rank=9999999"),
        *("steps=0", "steps=-1", "steps=1 steps=2", "batch=0", "precision=float8", "precision", "precision=Float32"),
    ],
)
def test_a_profile_that_says_nothing_known_is_refused_in_one_line(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"profile = '.*': must be of rank=<R>, layers=<N>, steps=<K>, batch="):
        PARTS.check(Profile(0, wrong))
    with pytest.raises(ConfigError, match="must be of rank=<R>"):
        small(Path("x"), strategy="hetlora", profiles=f"rank=1;{wrong}")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"strategy": "la-lora", "profiles": "rank=1"}, "profiles = 'rank=1': sites of la-lora do not differ but in"),
        ({"strategy": "la-lora", "profiles": "batch=0"}, "profile = 'batch=0': batch must be a whole number from 1"),
        ({"strategy": "la-lora", "profiles": "precision=float16"}, "precision one of float32, bfloat16, nf4"),
        (
            {"strategy": "hetlora", "merge__name": "mean"},
            "merge.name = 'mean': takes whole adapters, but hetlora lets sites differ",
        ),
        ({"strategy": "flexlora", "filter__name": "disk"}, "filter.name = 'disk': disk remembers gradients"),
        (
            {"strategy": "hetlora", "lora__form": "lora-sb", "profiles": "rank=1"},
            "lora.form = 'lora-sb': sites of hetlora differ in the ranks of lora_A and lora_B",
        ),
        ({"strategy": "ffa-lora", "merge__name": "product-svd"}, "the merge 'product-svd' changes what does not train"),
        ({"strategy": "hetlora", "trust": "secure-sum", "train__local_steps": 1}, "combines adapters, and no gradients"),
    ],
)
def test_what_makes_no_sense_is_refused(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        small(Path("x"), **overrides)


@pytest.mark.parametrize("strategy", ["hetlora", "hlora"])
def test_a_run_whose_sites_differ(strategy: str, finished: Callable[..., Finished]) -> None:
    done = finished(strategy=strategy, profiles=PROFILES)
    layout = MODELS.learner(done.settings).adapter.layout
    rounds = done.spy.training(1), done.spy.training(2)
    sites = [Profile(site, done.settings.words_of(site)) for site in range(len(rounds[0]))]
    plain = finished(strategy="dp-lora").spy.training(1)
    for exchanged in rounds:
        for site, (order, reply) in zip(sites, exchanged, strict=True):
            held, sent, got = PARTS.held(layout, site), arrays_of(order), arrays_of(reply)
            assert {name: tuple(value.shape) for name, value in sent.items()} == {name: held[name].shape for name in held}
            assert set(got) == PARTS.trains(held, site)
            assert all(value.shape == sent[name].shape and not torch.equal(value, sent[name]) for name, value in got.items())
    for (_, reply), (_, same) in zip(rounds[0], plain, strict=True):  # the noise does not depend on what a site trains
        assert reply.content["counters"] == same.content["counters"]
    start = {name: value.numpy() for name, value in arrays_of(rounds[0][0][0]).items()}  # of site 0, which holds everything
    updates = [
        Update(p.site, {n: t.numpy() for n, t in arrays_of(r).items()}) for p, (_, r) in zip(sites, rounds[0], strict=True)
    ]
    merge = {"hetlora": PER_ENTRY, "hlora": PRODUCT_SVD_SPLIT}[strategy]
    new = merge(start, together(updates), Memory(), Now(1, layout, MergeSettings(), {})).tensors
    for order, _ in rounds[1]:
        for name, value in arrays_of(order).items():
            corner = new[name][tuple(slice(size) for size in value.shape)]
            np.testing.assert_allclose(value.numpy(), corner, atol=1e-6)
