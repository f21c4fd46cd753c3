"""FLoRA with a rank for each site, against a literal loop over the paper's formula, and in whole runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lalora_flwr.adapter.lora_residual import LORA_D, residuals_of
from lalora_flwr.adapter.slots import HEAD, LORA_A, LORA_B, Layout, Slot
from lalora_flwr.engines.inline import run_inline
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.flora import METHOD
from lalora_flwr.methods.merges import Memory, Now
from lalora_flwr.methods.parts import PARTS
from lalora_flwr.methods.updates import Update, together
from lalora_flwr.server.plan import make_plan
from lalora_flwr.settings.schema import MergeSettings
from lalora_flwr.wire.profile import Profile
from tests.conftest import MODELS, Finished, arrays_of, small
from tests.server.test_resume import killed_after, result, resumed

RANK, M, N = 4, 5, 6
LAYERS = ("first", "second")
LAYOUT = Layout(
    [
        *(Slot(f"{layer}.A", layer, LORA_A, (RANK, N)) for layer in LAYERS),
        *(Slot(f"{layer}.B", layer, LORA_B, (M, RANK)) for layer in LAYERS),
        *(Slot(f"{layer}.D", layer, LORA_D, (M, N), frozen=True) for layer in LAYERS),
        Slot("head", "head", HEAD, (3,)),
    ]
)
RUN: dict[str, Any] = {
    **{"strategy": "flora", "lora__head": "trained", "num_rounds": 3, "num_supernodes": 4},
    **{"profiles": "rank=1;;rank=2 layers=1", "privacy__accountant": "rdp"},
}
words = st.tuples(st.none() | st.integers(1, 6), st.none() | st.integers(1, 3)).map(
    lambda part: " ".join(f"{name}={value}" for name, value in zip(("rank", "layers"), part, strict=True) if value)
)


@given(st.lists(words, min_size=1, max_size=4), st.booleans(), st.integers(0, 10**6))
def test_every_component_of_every_site_is_in_the_frozen_weights(profiles: list[str], begun: bool, seed: int) -> None:
    """``begun``: the run starts from an earlier adapter, so that B is not zero and weak sites leave some of it out."""
    draw = np.random.default_rng(seed)
    current = {name: draw.normal(size=slot.shape).astype(np.float32) for name, slot in LAYOUT.items()}
    if not begun:
        current.update({f"{layer}.B": np.zeros((M, RANK), dtype=np.float32) for layer in LAYERS})
    updates = []
    for site, own in enumerate(profiles):
        held = PARTS.held(LAYOUT, Profile(site, own))
        trained = PARTS.trains(held, Profile(site, own)) & held.trainable
        updates.append(Update(site, {name: draw.normal(size=held[name].shape).astype(np.float32) for name in sorted(trained)}))
    merged = METHOD.merge(current, together(updates), Memory(), Now(1, LAYOUT, MergeSettings(), {})).tensors
    for layer in LAYERS:
        A, B, D = (f"{layer}.{part}" for part in "ABD")
        senders = [update.tensors for update in updates if A in update.tensors]
        if not senders:
            assert not {A, B, D} & merged.keys()
            continue
        weight = current[D].astype(float)
        for sent in senders:
            own = current[B].astype(float), current[A].astype(float)  # what a site does not hold is as it was
            for j in range(sent[A].shape[0]):
                own[0][:, j], own[1][j] = sent[B][:, j], sent[A][j]
            for j in range(RANK):
                for row in range(M):
                    weight[row] += own[0][row, j] * own[1][j] / len(senders)
        np.testing.assert_allclose(merged[D], weight, atol=1e-5)
        assert not merged[B].any() and merged[A].shape == (RANK, N) and (np.abs(merged[A]) <= N**-0.5).all()
    heads = [update.tensors["head"] for update in updates]
    np.testing.assert_allclose(merged["head"], np.mean(heads, axis=0), atol=1e-6)


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_a_factor_that_was_frozen_is_cut_to_the_sites_rank(frozen: str) -> None:
    draw = np.random.default_rng(0)
    current = {name: draw.normal(size=slot.shape).astype(np.float32) for name, slot in LAYOUT.items()}
    whole, weak = (
        Update(site, {f"first.{p}": draw.normal(size=s).astype(np.float32) for p, s in shapes.items() if p != frozen})
        for site, shapes in enumerate([{"A": (4, N), "B": (M, 4)}, {"A": (2, N), "B": (M, 2)}])
    )
    merged = METHOD.merge(current, together([whole, weak]), Memory(), Now(1, LAYOUT, MergeSettings(), {})).tensors
    A, B = current["first.A"].astype(float), current["first.B"].astype(float)
    models = []
    for update in (whole, weak):
        own = {"A": A.copy(), "B": B.copy()}
        for name, value in update.tensors.items():
            own[name[-1]][tuple(slice(size) for size in value.shape)] = value
        models.append(own["B"] @ own["A"])
    np.testing.assert_allclose(merged["first.D"] - current["first.D"], np.mean(models, axis=0), atol=1e-5)


def test_a_run_whose_sites_differ_in_rank(finished: Callable[..., Finished]) -> None:
    done = finished(**RUN)
    layout = MODELS.learner(done.settings).adapter.layout
    sites = [Profile(site, done.settings.words_of(site)) for site in range(4)]
    *_, (last, _, _) = residuals_of(layout)
    for server_round in (1, 2):
        exchanged = done.spy.training(server_round)
        after = arrays_of(done.spy.training(server_round + 1)[1][0])  # of site 1, which holds everything
        start = arrays_of(exchanged[1][0])
        for site, (order, reply) in zip(sites, exchanged, strict=True):
            held, sent, got = PARTS.held(layout, site), arrays_of(order), arrays_of(reply)
            assert {name: tuple(value.shape) for name, value in sent.items()} == {name: held[name].shape for name in held}
            assert got.keys() == PARTS.trains(held, site) & layout.trainable
        assert [arrays_of(order)[min(layout.of(LORA_A))].shape[0] for order, _ in exchanged] == [1, 2, 2, 1]
        for name_A, name_B, name_D in residuals_of(layout):
            products = [
                reply[name_B].double() @ reply[name_A].double() for _, r in exchanged if name_A in (reply := arrays_of(r))
            ]
            assert len(products) == (4 if name_A == last else 3)  # site 2 trains the last layer alone
            expected = start[name_D].double() + torch.stack(products).mean(0)
            torch.testing.assert_close(after[name_D].double(), expected, atol=1e-6, rtol=0)
            assert not after[name_B].any()
    assert np.isfinite(done.summary["loss"]) and done.summary["loss"] < done.summary["frozen_loss"]


def test_weak_sites_together_change_the_weights_in_more_ranks_than_any_of_them(
    finished: Callable[..., Finished],
) -> None:
    """n sites of rank 1 make a change of rank n in a round, where ``hetlora`` and ``flexlora`` stay within the run's rank."""
    done = finished(strategy="flora", profiles="rank=1", num_rounds=1, privacy__accountant="rdp")
    for name, value in done.checkpoint.items():
        if name.endswith(f"{LORA_D}.weight"):
            assert torch.linalg.matrix_rank(value.double(), rtol=1e-5) == 3


def test_it_goes_on_after_a_death(tmp_path: Path, finished: Callable[..., Finished]) -> None:
    killed_after(small(tmp_path, **RUN), 2)
    run_inline(resumed(tmp_path, **RUN))
    assert result(tmp_path / "run") == result(finished(**RUN).path)


@pytest.mark.parametrize(
    ("keys", "refusal"),
    [
        ({"merge__name": "mean"}, r"merge\.name = 'mean': must be 'auto' for strategy = 'flora', which is its merge"),
        ({"merge__name": "per-entry"}, r"merge\.name = 'per-entry': must be 'auto' for strategy = 'flora'"),
        ({"merge__travel": "everything-down", "profiles": "rank=1"}, "choose hetlora, flexlora, hlora or flora"),
        ({"merge__travel": "trained"}, r"the merge 'stack' changes what does not train, so all of it must go down"),
        ({"lora__form": "lora"}, r"merge\.name = 'stack': combines lora_D, which the form 'lora' does not train"),
        ({"filter__name": "disk"}, "disk remembers gradients, of factors that 'stack'"),
        ({"trust": "secure-sum", "train__local_steps": 1}, "combines adapters, and no gradients"),
        ({"profiles": "rank=0"}, r"profile = 'rank=0': must be of rank=<R>"),
        ({"strategy": "fedex-lora", "profiles": "rank=1"}, "sites of fedex-lora do not differ but in batch and precision"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(keys: dict[str, Any], refusal: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=refusal) as said:
        small(tmp_path, **{"strategy": "flora", **keys})
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(("schedule", "steps", "at"), [("round:BA", 2, 2), ("step:AB", 1, 1), ("round:B2A", 1, 3)])
def test_a_round_that_trains_no_b_is_refused_since_b_begins_at_zero(schedule: str, steps: int, at: int, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"strategy": "flora", "num_rounds": 3, "train__local_steps": steps}
    with pytest.raises(ConfigError, match=rf"round {at} trains no lora_B, which begins at zero in every round"):
        make_plan(small(tmp_path, **keys, lora__schedule=schedule))
    make_plan(small(tmp_path, **{**keys, "train__local_steps": 2}, lora__schedule="step:BA"))
    make_plan(small(tmp_path, **keys, lora__schedule="B", lora__head="ridge"))
