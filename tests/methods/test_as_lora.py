"""AS-LoRA: who trains follows from scores of released tensors, as the paper says; the noise they are freed of is the real one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st

from lalora_flwr.adapter.slots import LORA_A, LORA_B, Layout, Slot, factors_of
from lalora_flwr.engines.inline import run_inline
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.seeds import derive_seed
from lalora_flwr.methods.as_lora import METHOD, probability_of_a
from lalora_flwr.methods.merges import Mean, Memory, Merged, Now
from lalora_flwr.methods.method import method_of
from lalora_flwr.methods.updates import Tensors, Update, Updates, together
from lalora_flwr.server.plan import make_plan
from lalora_flwr.server.released import noise_by_slot
from lalora_flwr.settings.choices import MERGES
from lalora_flwr.settings.schema import MergeSettings
from tests.conftest import Finished, Spy, arrays_of, run_spied, small
from tests.server.federations import failing
from tests.server.test_resume import killed_after, result, resumed
from tests.sites import servers_learner

LONG: dict[str, Any] = {
    "strategy": "as-lora",
    "num_rounds": 5,
    "lora__head": "trained",
    "filter__name": "none",
    "seed": 1,
    "privacy__accountant": "rdp",
}


def told(order: Message) -> list[str]:
    directive = json.loads(str(order.content["config"]["directive"]))
    assert directive.keys() == {"A"}
    return list(directive["A"])


class Transcription:
    """AS-LoRA's server, a layer and a number after the other; choices after the warm-up come with their probability."""

    def __init__(self, layers: Sequence[str], rounds: int) -> None:
        self.layers, self.warm_up = layers, max(2, math.ceil(rounds / 10))
        self.S: dict[tuple[str, str], float] = {}
        self.T, self.done = 1.0, 0

    def hear(self, layer: str, factor: str, update: np.ndarray, tau: float) -> None:
        energy = sum(float(x) ** 2 for x in update.ravel())
        s = energy - update.size * tau**2
        s = s if s > 0 else 0.0
        key = (layer, factor)
        self.S[key] = 0.9 * self.S[key] + 0.1 * s if key in self.S else s

    def next(self) -> dict[str, float]:
        """The probability of A in each layer."""
        self.done += 1
        if self.done < self.warm_up:
            return dict.fromkeys(self.layers, 1.0 if self.done % 2 == 1 else 0.0)
        p = {}
        for layer in self.layers:
            a, b = self.S[layer, "A"], self.S[layer, "B"]
            d = (a - b) / (abs(a) + abs(b)) if a or b else 0.0
            p[layer] = 0.9 * (1 / (1 + math.exp(-d / self.T))) + 0.05
        self.T = max(0.1, self.T * 0.95)
        return p


@pytest.mark.parametrize("how", [{}, {"train__local_steps": 1, "train__step_at": "server"}], ids=["sites step", "server steps"])
def test_a_run_follows_the_paper(how: dict[str, Any], finished: Callable[..., Finished]) -> None:
    done = finished(**LONG, **how)
    layout = servers_learner(done.settings).adapter.layout
    pairs = {layout[name_A].layer: {"A": name_A, "B": name_B} for name_A, name_B in factors_of(layout)}
    train, steps = done.settings.train, done.settings.train.local_steps
    nu = done.summary["noise_multiplier"] * done.settings.privacy.clip_norm / train.batch_size / math.sqrt(3)
    paper, rounds, differing = Transcription(list(pairs), 5), 5, 0
    assert told(done.spy.training(1)[0][0]) == []
    for server_round in range(1, rounds):
        exchanged = done.spy.training(server_round)
        chosen, start = told(exchanged[0][0]), arrays_of(exchanged[0][0])
        replies = [arrays_of(reply) for _, reply in exchanged]
        for layer, names in pairs.items():
            factor = "A" if layer in chosen else "B"
            assert all(names[factor] in reply and names["AB".replace(factor, "")] not in reply for reply in replies)
            mean = np.mean([reply[names[factor]].double().numpy() for reply in replies], axis=0)
            update = mean if how else mean - start[names[factor]].double().numpy()
            paper.hear(layer, factor, update, nu if how else train.lr * nu * math.sqrt(steps))
        p, after = paper.next(), told(done.spy.training(server_round + 1)[0][0])
        draws = np.random.default_rng(derive_seed(1, "as-lora", server_round)).random(len(pairs))
        assert after == sorted(layer for layer, u in zip(pairs, draws, strict=True) if u < p[layer])
        differing += 0 < len(after) < len(pairs)
        assert all(name in reply for reply in replies for name in layout.of("head"))
    assert differing  # layers did choose differently


def test_a_long_run_on_many_layers_cools_down_as_the_paper_does() -> None:
    """The server alone, with made-up updates, over a warm-up of 6 rounds and 54 more; now and then a layer's signal is gone."""
    layers = [f"l{number:02}" for number in range(30)]
    layout = Layout(
        slot
        for layer in layers
        for slot in (Slot(f"{layer}.a", layer, LORA_A, (1, 3), 1), Slot(f"{layer}.b", layer, LORA_B, (2, 1), 0))
    )
    draw, paper = np.random.default_rng(5), Transcription(layers, 60)
    memory, directive = Memory(), METHOD.merge.start(layout)
    current = {name: np.ones(slot.shape) for name, slot in layout.items()}
    for server_round in range(1, 61):
        mask = METHOD.schedule.mask(layout, server_round, 0, directive)
        assert mask == {f"{layer}.{'a' if layer in json.dumps(directive) else 'b'}" for layer in layers}
        sizes = {name: draw.choice([0.1, 1.0, 2.0]) * (1.2 if name.endswith("a") else 1.0) for name in sorted(mask)}
        sent = {name: 1 + size * draw.normal(size=layout[name].shape) for name, size in sizes.items()}
        now = Now(server_round, layout, MergeSettings(), directive, rounds=60, seed=9, noise=dict.fromkeys(mask, 0.3))
        merged = METHOD.merge(current, together([Update(0, sent)]), memory, now)
        for name, value in sent.items():
            paper.hear(layout[name].layer, name[-1].upper(), value - 1, 0.3)
        p, draws = paper.next(), np.random.default_rng(derive_seed(9, "as-lora", server_round)).random(30)
        assert merged.directive == {"A": [layer for layer, u in zip(layers, draws, strict=True) if u < p[layer]]}
        memory, directive = merged.memory, merged.directive


class Watched(Mean):
    """The mean; keeps what it was told of the noise, and what came."""

    name = "test-watched"
    takes_gradients = True

    def __init__(self) -> None:
        self.seen: list[tuple[Tensors, Updates, Now]] = []

    def __call__(self, current: Tensors, updates: Updates, memory: Memory, now: Now) -> Merged:
        self.seen.append((current, updates, now))
        return super().__call__(current, updates, memory, now)


WATCHED = Watched()
MERGES.register("test-watched", WATCHED)
LOUD = {"privacy__epsilon": 0.3, "privacy__accountant": "rdp", "merge__name": "test-watched", "filter__name": "none"}


@pytest.mark.parametrize(
    "how",
    [
        {"strategy": "dp-lora", "train__local_steps": 3},
        {"strategy": "la-lora", "train__local_steps": 5, "lora__schedule": "step:BBA"},
        {"strategy": "dp-lora", "train__local_steps": 2, "train__lr": 0.0},
        {"strategy": "dp-lora", "train__local_steps": 1, "train__step_at": "server", "train__momentum": 0.5},
        {"strategy": "dp-lora", "train__local_steps": 1, "trust": "secure-sum", "train__decay": "linear"},
        {"strategy": "dp-lora", "train__local_steps": 2, "fraction_train": 0.67},
    ],
    ids=["steps", "some steps", "rate by rule", "server steps", "secure sum", "some sites"],
)
def test_the_noise_that_a_merge_is_told_of_is_the_noise_that_there_is(how: dict[str, Any], tmp_path: Path) -> None:
    """Where it drowns all else: the entries of each kind say their standard deviation to a few percent."""
    WATCHED.seen.clear()
    run_spied(small(tmp_path, **{**LOUD, **how, "lora__rank": 16, "num_rounds": 1}), Spy())
    assert len(WATCHED.seen) == 1
    found: dict[str, list[np.ndarray]] = {}
    for current, updates, now in WATCHED.seen:
        assert now.noise is not None and now.noise.keys() == updates.total.keys() and now.rounds == 1
        for name, total in updates.total.items():
            moved = total / updates.count - (0 if now.gradients else current[name])
            found.setdefault(now.layout[name].part, []).append((moved / now.noise[name]).ravel())
    for kind, values in found.items():
        entries = np.concatenate(values)
        spread = float(np.sqrt(np.mean(np.square(entries))))
        assert len(entries) > 1000 and spread == pytest.approx(1.0, abs=4 / math.sqrt(2 * len(entries))), (kind, spread)


def test_it_is_so_too_where_a_site_fails_and_rates_follow_from_the_noise(tmp_path: Path) -> None:
    WATCHED.seen.clear()
    how = {"strategy": "dp-lora", "train__lr": 0.0, "num_rounds": 1, "lora__rank": 16}
    run_spied(small(tmp_path, **LOUD, **how), Spy(failing(1)))
    ((current, updates, now),) = WATCHED.seen
    assert updates.count == 2 and now.noise is not None
    moved = [((total / 2 - current[name]) / now.noise[name]).ravel() for name, total in updates.total.items()]
    assert float(np.sqrt(np.mean(np.square(np.concatenate(moved))))) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize(
    "keys",
    [
        {"train__momentum": 0.5},
        {"train__weight_decay": 0.1},
        {"train__optimizer": "adamw"},
        {"filter__name": "gauss5"},
        {"merge__max_update_norm": 1.0},
    ],
)
def test_where_an_update_is_more_than_a_sum_its_noise_is_not_known(keys: dict[str, Any], tmp_path: Path) -> None:
    settings = small(tmp_path, strategy="dp-lora", **{"filter__name": "none", **keys})
    assert noise_by_slot(settings, method_of(settings), LAYOUT, 1, {}, 0.1, 3) is None
    asked = {**LONG, **keys}
    with pytest.raises(ConfigError, match="'as-lora'"):
        small(tmp_path, **asked)
    if "merge__max_update_norm" not in keys:  # there the gradients themselves come
        small(tmp_path, **asked, train__local_steps=1, train__step_at="server")


LAYOUT = Layout(
    slot
    for layer in ("x", "y")
    for slot in (Slot(f"{layer}.a", layer, LORA_A, (2, 50), 1), Slot(f"{layer}.b", layer, LORA_B, (40, 2), 0))
)


def test_scores_of_noise_alone_are_small_against_those_of_a_signal_of_its_size() -> None:
    """Without the floor removed, A with more entries would always win."""
    draw, current = np.random.default_rng(0), {name: np.zeros(slot.shape) for name, slot in LAYOUT.items()}
    memory, now = Memory(), Now(1, LAYOUT, MergeSettings(), {}, rounds=400, noise=dict.fromkeys(LAYOUT, 1.0))
    for _ in range(200):
        noised = {name: draw.normal(size=slot.shape) + (1.0 if name == "x.b" else 0.0) for name, slot in LAYOUT.items()}
        memory = METHOD.merge(current, together([Update(0, noised)]), memory, now).memory
    (a, b), (other_a, other_b) = memory.tensors["scores"]
    assert b == pytest.approx(80, rel=0.2) and max(a, other_a, other_b) < 15


SCORES = st.one_of(st.just(0.0), st.floats(1e-100, 1e9))  # in other units the smallest floats would be zero


@given(
    st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=5),
    st.floats(0.1, 1.0),
    st.floats(1e-6, 1e6),
)
def test_chances_favour_the_larger_score_leave_none_out_and_know_no_units(
    scores: list[tuple[float, float]], T: float, unit: float
) -> None:
    p = probability_of_a(np.array(scores), T)
    assert ((p >= 0.05) & (p <= 0.95)).all()
    for (a, b), chance in zip(scores, p, strict=True):
        assert (chance - 0.5) * (a - b) >= 0
    np.testing.assert_allclose(probability_of_a(np.array(scores) * unit, T), p, atol=1e-9)


def test_it_goes_on_after_a_death(tmp_path: Path, finished: Callable[..., Finished]) -> None:
    killed_after(small(tmp_path, **LONG), 3)
    run_inline(resumed(tmp_path, **LONG))
    assert result(tmp_path / "run") == result(finished(**LONG).path)


def test_it_runs_with_a_secure_sum_and_after_a_ridge_head(tmp_path: Path) -> None:
    keys = {"trust": "secure-sum", "train__local_steps": 1, "lora__head": "ridge", "train__lr": 0.0, "num_rounds": 3}
    spy = Spy()
    run_spied(small(tmp_path, **{**LONG, **keys}), spy)
    layers = {slot.layer for slot in servers_learner(small(tmp_path, **LONG)).adapter.layout.values() if slot.part == LORA_A}
    assert [len(told(spy.training(t)[0][0])) for t in (2, 3)] == [0, len(layers)]  # the warm-up, behind the head's round


def test_a_plan_foresees_both_factors(tmp_path: Path) -> None:
    plan, ro = (
        make_plan(small(tmp_path, **{**LONG, "strategy": strategy, "train__lr": 0.0, "lora__head": "frozen"}))
        for strategy in ("as-lora", "rolora")
    )
    assert plan.bytes_up == ro.bytes_up and plan.rate == ro.rate and plan.trainable == ro.trainable


@pytest.mark.parametrize(
    ("keys", "refusal"),
    [
        ({"lora__schedule": "both"}, r"lora\.schedule = 'both': must be 'auto' for strategy = 'as-lora'"),
        ({"merge__name": "median"}, r"merge\.name = 'median': must be 'auto' for strategy = 'as-lora'"),
    ],
)
def test_schedule_and_merge_belong_together(keys: dict[str, Any], refusal: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=refusal):
        small(tmp_path, **{**LONG, **keys})


def test_there_must_be_factors_to_choose_from(tmp_path: Path) -> None:
    schedule = METHOD.schedule
    with pytest.raises(ConfigError, match="the form has no layer with lora_A and lora_B to choose from"):
        schedule.fits(Layout([Slot("h", "head", "head", (3,))]))
