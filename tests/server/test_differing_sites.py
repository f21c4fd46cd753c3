"""Sites that take fewer local steps, fewer records at once or another precision: the same ε for all, and no lies about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lalora_flwr.privacy.accounting import epsilon_spent, noise_multiplier_for
from tests.conftest import Finished, Spy, arrays_of, run_spied, small
from tests.server.lies import LIAR, counters_of, lying

PROFILES = "steps=1;;steps=50 rank=1"
STRICT: dict[str, Any] = {"num_rounds": 1, "privacy__epsilon": 0.3}
Make = Callable[..., Finished]


def test_a_site_of_fewer_steps_has_the_epsilon_of_all_and_the_noise_of_its_own_steps(finished: Make) -> None:
    done = finished(strategy="hetlora", profiles=PROFILES)
    sites = done.summary["sites"]
    assert {site: own["steps"] for site, own in sites.items()} == {"0": 2, "1": 4, "2": 4}
    for site, own in sites.items():
        steps = {"0": 2}.get(site, 4)
        assert own["noise_multiplier"] == noise_multiplier_for(4.0, 1e-4, own["sample_rate"], steps, "pld")
        assert own["epsilon"] == pytest.approx(epsilon_spent([(own["noise_multiplier"], own["sample_rate"], steps)], 1e-4, "pld"))
        assert 3.9 < own["epsilon"] <= 4.0
        assert own["claimed_steps"] == steps
    assert [line["failures"] for line in done.metrics] == [0, 0]


def test_it_takes_the_first_steps_of_the_round_and_counts_alike(finished: Make) -> None:
    """What it sends is what it sends in a run of one local step; the mean of A is over all, each alike."""
    done = finished(strategy="hetlora", profiles="steps=1;;", num_rounds=1)
    single = finished(strategy="hetlora", train__local_steps=1, num_rounds=1)
    assert "cosine_B" in done.metrics[0] and "snr" not in done.metrics[0]  # how much of the mean is noise is not known
    replies = [arrays_of(reply) for _, reply in done.spy.training(1)]
    for name, value in arrays_of(single.spy.training(1)[0][1]).items():
        assert torch.equal(replies[0][name], value), name
    for name, value in done.checkpoint.items():
        np.testing.assert_allclose(value, sum(reply[name].double() for reply in replies) / 3, atol=1e-7)


def test_a_schedule_in_steps_ends_with_the_sites_last_step(finished: Make) -> None:
    done = finished(strategy="hetlora", profiles="steps=1;;", lora__schedule="step:BA", num_rounds=1)
    sent = [{name.rsplit("_", 1)[-1][:1] for name in arrays_of(reply)} for _, reply in done.spy.training(1)]
    assert sent[0] == {"B"} and sent[1] == sent[2] == {"A", "B"}
    for name, value in done.checkpoint.items():
        who = [arrays_of(reply)[name].double() for _, reply in done.spy.training(1) if name in arrays_of(reply)]
        assert len(who) == (3 if "lora_B" in name else 2)
        np.testing.assert_allclose(value, sum(who) / len(who), atol=1e-7)


def test_by_the_rule_a_site_of_fewer_steps_takes_longer_ones(tmp_path: Path) -> None:
    """So that it moves as far along a gradient, and by as much noise, as the others."""
    spy = Spy()
    settings = small(tmp_path, strategy="hetlora", profiles="steps=1;", train__local_steps=8, train__lr=0.0, **STRICT)
    run_spied(settings, spy)
    moved = []
    for order, reply in spy.training(1):
        start = arrays_of(order)
        moved.append(sum(float((value - start[name]).double().square().sum()) for name, value in arrays_of(reply).items()) ** 0.5)
    assert 0.5 < moved[0] / moved[1] < 2


@pytest.mark.parametrize("strategy", ["la-lora", "hetlora"])
def test_batch_and_precision_change_what_is_sent_by_rounding_alone(strategy: str, finished: Make) -> None:
    plain = finished(strategy=strategy, num_rounds=1, model__dtype="float32")
    own = finished(
        strategy=strategy, num_rounds=1, model__dtype="float32", profiles="batch=3;precision=bfloat16;batch=7 precision=float32"
    )
    for site, ((order, one), (_, other)) in enumerate(zip(plain.spy.training(1), own.spy.training(1), strict=True)):
        start, differs = arrays_of(order), 0.0
        for name, value in arrays_of(one).items():
            moved = float((value - start[name]).norm())
            differs = max(differs, float((arrays_of(other)[name] - value).norm()) / max(moved, 1e-12))
        assert (1e-5 < differs < 0.05) if site == 1 else differs < 1e-5, (site, differs)
    for name in ("epsilon", "noise_multiplier", "sites"):
        assert own.summary[name] == plain.summary[name]


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"steps": 3}, "counts 3 steps, not between the 1 it was asked for and the 2 its noise is calibrated for"),
        ({"noise-multiplier": "of all steps"}, "the run's target asks for"),
    ],
)
def test_a_site_that_declares_fewer_steps_is_held_to_them(
    counts: dict[str, Any], said: str, tmp_path: Path, finished: Make
) -> None:
    honest = finished(strategy="hetlora", profiles=";steps=1;")
    q = honest.summary["sites"][str(LIAR)]["sample_rate"]
    values = {n: noise_multiplier_for(4.0, 1e-4, q, 4, "pld") if v == "of all steps" else v for n, v in counts.items()}
    settings = small(tmp_path, strategy="hetlora", profiles=";steps=1;")
    spy = lying(lambda content: counters_of(content).update(values), 1)
    run = Finished(run_spied(settings, spy), settings, spy)
    assert said in run.metrics[0]["failed_sites"][str(LIAR)]
    assert run.summary["epsilon"] <= 4.0
