"""The learning rate by rule: the walk of the noise has one length, whatever makes the noise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context
from hypothesis import given
from hypothesis import strategies as st

from lalora_flwr.adapter.slots import LORA_A, LORA_B
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.method import method_of
from lalora_flwr.methods.smoothing import GAUSS5
from lalora_flwr.privacy.noise import mechanism_for
from lalora_flwr.server.counts import SiteCounts
from lalora_flwr.server.plan import make_plan
from lalora_flwr.settings import Settings, settings_from
from lalora_flwr.training.rate import LARGEST, MOST, MOST_WITH_A, PLAIN, WALK, WALK_A, WALK_AVERAGED, noise_at_all, rate_for
from tests.conftest import MODELS, Finished, arrays_of, small
from tests.ledger.site_ledgers import owned
from tests.sites import REAL, train_order

BASE: dict[str, Any] = {"train__lr": 0.0, "filter__name": "none", "num_rounds": 4, "train__local_steps": 5}
LAYOUT = MODELS.learner(settings_from({"lora.head": "trained"})).adapter.layout


def rate(noise: float, **changed: Any) -> float:
    settings = small(Path("x"), **{**BASE, **changed})
    return rate_for(settings, method_of(settings), LAYOUT, noise)


def test_the_walk_of_each_kind_has_its_length() -> None:
    assert rate(0.1, strategy="ffa-lora") == pytest.approx(WALK / (0.1 * math.sqrt(20)))
    assert rate(0.1, strategy="ffa-lora", merge__average="ema") == pytest.approx(WALK_AVERAGED / (0.1 * math.sqrt(20)))
    assert rate(0.1, strategy="dp-lora") == pytest.approx(WALK_A / (0.1 * math.sqrt(20)))
    assert rate(0.1, strategy="la-lora") == pytest.approx(WALK_A / (0.1 * math.sqrt(8)))  # step:BA of 5 steps: two of A
    assert rate(0.1, strategy="rolora") == pytest.approx(WALK_A / (0.1 * math.sqrt(10)))
    assert rate(0.1, strategy="la-lora", lora__schedule="step:B4A1") == pytest.approx(
        min(WALK_A / (0.1 * math.sqrt(4)), WALK / (0.1 * math.sqrt(20)))
    )


def test_where_a_moves_with_b_the_walk_of_b_is_half_as_long() -> None:
    assert rate(0.1, strategy="fedask") == pytest.approx(WALK / 2 / (0.1 * math.sqrt(20)))
    assert rate(0.1, strategy="fedsvd") == pytest.approx(WALK / (0.1 * math.sqrt(20)))


def test_an_a_that_begins_anew_may_walk_longer() -> None:
    assert rate(0.1, strategy="flora") == pytest.approx(1.8 * WALK_A / (0.1 * math.sqrt(20)))
    assert rate(0.1, strategy="fedex-lora") == pytest.approx(WALK_A / (0.1 * math.sqrt(20)))


def test_a_filter_and_a_momentum_are_made_up_for() -> None:
    plain, mu = rate(0.1), 0.9
    site = sum((1 - mu**k) / (1 - mu) for k in range(1, 6)) / 5  # an optimizer of five steps
    assert rate(0.1, train__momentum=mu) == pytest.approx(plain / site)
    once: dict[str, Any] = {"train__local_steps": 1, "num_rounds": 50}
    assert rate(0.1, **once, train__momentum=mu) == pytest.approx(rate(0.1, **once))  # forgotten after each step
    server = sum((1 - mu**k) / (1 - mu) for k in range(1, 51)) / 50
    assert rate(0.1, **once, train__momentum=mu, train__step_at="server") == pytest.approx(rate(0.1, **once) / server)
    assert GAUSS5.keeps == pytest.approx(70 / 256)
    of_head = WALK / (0.1 * math.sqrt(20))  # which the filter does not smooth, and which trains at every step
    assert rate(0.1, filter__name="gauss5") == pytest.approx(of_head)
    assert of_head < plain / math.sqrt(70 / 256)
    for name in ("doppler", "disk", "wiener", "gauss-adaptive"):
        assert rate(0.1, filter__name=name) == plain


def test_a_filter_is_made_up_for_where_all_is_smoothed() -> None:
    own = LAYOUT.only(LAYOUT.of(LORA_A, LORA_B))
    for name, keeps in (("gauss5", 70 / 256), ("gauss:3", 6 / 16), ("gauss-permuted:3", 6 / 16)):
        plain, smoothed = (small(Path("x"), **{**BASE, "filter__name": one}) for one in ("none", name))
        rates = [rate_for(keys, method_of(keys), own, noise) for keys in (plain, smoothed) for noise in (0.1, 0.0)]
        assert rates[2:] == pytest.approx([one / math.sqrt(keeps) for one in rates[:2]])


def test_a_slower_a_lets_b_step_as_far_as_without_it() -> None:
    both = {"strategy": "dp-lora", "privacy__clip_norm": 1.0}
    alone, a, slow = (rate(0.1, **keys) for keys in ({"strategy": "ffa-lora"}, both, {**both, "filter__name": "slow-a"}))
    assert a == pytest.approx(WALK_A / (0.1 * math.sqrt(20))) and slow == alone == pytest.approx(WALK / (0.1 * math.sqrt(20)))
    half = rate(0.1, **both, filter__name="slow-a:0.5")  # here A is still the one that bears less
    assert half == pytest.approx(2 * a)
    assert rate(1e-9, **both, filter__name="slow-a:0.5") == 2 * MOST_WITH_A
    assert rate(1e-9, **both, filter__name="slow-a:0.1") == MOST


def test_little_noise_does_not_make_it_large() -> None:
    assert rate(1e-9, strategy="ffa-lora", privacy__clip_norm=2.0) == MOST / 2
    for name in ("none", "gauss5"):  # which shortens steps only where gradients are rough
        assert rate(1e-9, privacy__clip_norm=0.5, filter__name=name) == MOST_WITH_A / 0.5
    assert rate(1e-9, privacy__clip_norm=0.5, **{"train__momentum": 0.9, "train__local_steps": 1}) == MOST_WITH_A / 0.5
    assert rate(0.0, privacy__epsilon=math.inf) == PLAIN
    assert rate(1e-9, strategy="ffa-lora", privacy__clip_norm=0.01) == LARGEST  # where owners' ranges end


def test_a_rate_that_is_named_stands() -> None:
    assert rate(0.1, train__lr=0.7) == 0.7


def test_the_round_of_a_ridge_head_is_no_step_of_it() -> None:
    assert rate(0.1, strategy="ffa-lora", lora__head="ridge", num_rounds=5) == rate(0.1, strategy="ffa-lora")


@given(st.floats(1e-6, 1e3), st.floats(1.01, 100))
def test_more_noise_never_makes_it_larger(noise: float, times: float) -> None:
    assert rate(noise * times) <= rate(noise)


def test_it_is_for_sgd_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.lr = 0: the rule is for train.optimizer = 'sgd'"):
        small(tmp_path, **{**BASE, "train__optimizer": "adamw"})


def own_rate(settings: Settings, records: int) -> float:
    noise = noise_at_all(mechanism_for(settings, records), settings.sites_per_round)
    return rate_for(settings, method_of(settings), MODELS.learner(settings).adapter.layout, noise)


def test_sites_and_server_step_at_the_rate_of_the_plan(finished: Callable[..., Finished], tmp_path: Path) -> None:
    """The same run with the rate named ends at the same adapter, whoever takes the step and shares the noise."""
    once = {"train__lr": 0.0, "train__local_steps": 1}
    for changed in ({}, {"train__step_at": "server"}, {"trust": "secure-sum"}):
        by_rule = finished(**{**once, **changed})
        assert make_plan(by_rule.settings).rate > 0
        named = finished(**{**once, **changed, "train__lr": make_plan(by_rule.settings).rate})
        assert by_rule.checkpoint.keys() == named.checkpoint.keys()
        for name, value in by_rule.checkpoint.items():
            assert float((value - named.checkpoint[name]).norm()) <= 0.02 * float(value.norm()) + 1e-6


def test_a_real_site_takes_it_of_its_declared_records_and_its_owners_range_holds(
    context: Callable[..., Context], tmp_path: Path
) -> None:
    settings = small(tmp_path, train__lr=0.0)
    rate = own_rate(settings, 300)

    def serve(settings: Settings, **more: Any) -> Any:
        return REAL(train_order(settings), owned(context(settings), tmp_path, **more))

    refused = serve(settings, **{"lr-range": f"{rate * 1.01},10"})
    assert "lr-range" in refused.error.reason
    assert not serve(settings, **{"lr-range": f"{rate * 0.99},{rate * 1.01}"}).has_error()


def test_a_site_that_takes_no_step_is_asked_for_no_rate(context: Callable[..., Context], tmp_path: Path) -> None:
    settings = small(tmp_path, train__lr=0.0, train__local_steps=1, train__step_at="server")
    far = own_rate(settings, 300) * 10
    assert not REAL(train_order(settings), owned(context(settings), tmp_path, **{"lr-range": f"{far},{2 * far}"})).has_error()


def test_a_wide_range_holds_a_rate(context: Callable[..., Context], tmp_path: Path) -> None:
    settings = small(tmp_path, train__lr=0.0)
    for limits in ("1e-12,1e6", "1e-9,1e5"):
        assert not REAL(train_order(settings), owned(context(settings), tmp_path, **{"lr-range": limits})).has_error()


def test_one_site_that_lies_about_its_noise_does_not_decide() -> None:
    counts = SiteCounts(small(Path("x")))
    for site, sigma in enumerate((1.0, 1.1, 50.0)):
        counts.of(site).noise_multiplier = sigma
    assert counts.noise_of_mean([0, 1, 2]) == pytest.approx(1.1 * counts.settings.privacy.clip_norm / 40 / math.sqrt(3))


def test_ridge_heads_have_their_own(tmp_path: Path) -> None:
    settings = small(tmp_path, strategy="ridge-head", train__lr=0.0)
    method = method_of(settings)
    assert rate_for(settings, method, LAYOUT, 5.0) == method.own_rate == dataclasses.replace(method).own_rate > 0


def test_steady_lora_is_b_alone_averaged_one_step_a_round(finished: Callable[..., Finished], tmp_path: Path) -> None:
    done = finished(strategy="steady-lora", train__lr=0.0, train__local_steps=1, num_rounds=6, lora__head="trained")
    assert done.summary["last_accuracy"] is not None
    for order, reply in done.spy.training(2):
        assert {name.split(".")[-2] for name in arrays_of(reply) if "lora_" in name} == {"lora_B"}
        assert not [name for name in arrays_of(order) if "lora_A" in name]
    with pytest.raises(ConfigError, match=r"train.local-steps = 2: must be 1 for strategy = 'steady-lora'"):
        small(tmp_path, strategy="steady-lora")
