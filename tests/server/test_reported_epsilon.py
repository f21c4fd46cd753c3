"""The ε of a run is what its sites' steps cost, by Opacus' own accountant too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from opacus.accountants import PRVAccountant

from tests.conftest import (
    Finished,
    Spy,
    run_spied,
    small,
)
from tests.server.federations import a_nan, failing, lying

PRV_ERROR = 0.01


def opacus_epsilon(sigma: float, q: float, steps: int, delta: float) -> float:
    """Another accountant's bound, which holds its own error twice at most."""
    accountant = PRVAccountant()
    accountant.history = [(sigma, q, steps)]
    return float(accountant.get_epsilon(delta, eps_error=PRV_ERROR))


@pytest.mark.parametrize("overrides", [{}, {"data__partition": "dirichlet"}], ids=["iid", "dirichlet"])
def test_epsilon_is_the_largest_over_sites_of_what_their_steps_cost(
    overrides: dict[str, Any], finished: Callable[..., Finished]
) -> None:
    run = finished(**overrides)
    delta = run.settings.privacy.delta
    for line in run.metrics:
        steps = line["round"] * run.settings.train.local_steps
        sites = [reply.content["counters"] for _, reply in run.spy.training(line["round"])]
        assert [counters["steps"] for counters in sites] == [steps] * 3
        costs = [opacus_epsilon(c["noise-multiplier"], c["sample-rate"], steps, delta) for c in sites]
        assert max(costs) - 2 * PRV_ERROR < line["epsilon"] < max(costs)
    spent = [line["epsilon"] for line in run.metrics]
    assert spent == sorted(spent) and spent[0] > 0
    summary = run.summary
    assert spent[-1] == summary["epsilon"] == max(s["epsilon"] for s in summary["sites"].values())
    assert summary["epsilon"] <= run.settings.privacy.epsilon
    assert summary["epsilon"] > 0.97 * run.settings.privacy.epsilon
    steps = run.settings.num_rounds * run.settings.train.local_steps
    own = opacus_epsilon(summary["noise_multiplier"], summary["sample_rate"], steps, summary["delta"])
    assert own - 2 * PRV_ERROR < summary["epsilon"] < own


def test_the_epsilon_of_sites_that_failed_later_stays_in_the_maximum(tmp_path: Path) -> None:
    settings = small(tmp_path, data__partition="dirichlet", max_failures=2)
    first_only = Finished(run_spied(settings, spy := Spy(failing(0, 1, rounds=[2]))), settings, spy)
    before, after = (line["epsilon"] for line in first_only.metrics)
    assert after >= before
    assert first_only.summary["epsilon"] == max(s["epsilon"] for s in first_only.summary["sites"].values())
    assert {number: s["steps"] for number, s in first_only.summary["sites"].items()} == {"0": 4, "1": 4, "2": 4}  # as asked


def test_a_rejected_reply_was_released_and_its_steps_count(tmp_path: Path) -> None:
    settings = small(tmp_path, num_rounds=1)
    run = Finished(run_spied(settings, spy := Spy(lying(1, a_nan))), settings, spy)
    assert run.metrics[0]["failed_sites"].keys() == {"1"} and run.summary["sites"]["1"]["steps"] == 2


def test_the_rdp_accountant_reports_its_own_epsilon(finished: Callable[..., Finished]) -> None:
    summary = finished(privacy__accountant="rdp", num_rounds=1).summary
    assert summary["accountant"] == "rdp" and 0 < summary["epsilon"] <= 4.0
    prv = opacus_epsilon(summary["noise_multiplier"], summary["sample_rate"], 2, summary["delta"])
    assert prv < summary["epsilon"]


def test_dirichlet_sites_have_their_own_sample_rate_and_noise(finished: Callable[..., Finished]) -> None:
    run = finished(data__partition="dirichlet")
    sites = run.summary["sites"].values()
    assert len({s["sample_rate"] for s in sites}) == len({s["noise_multiplier"] for s in sites}) == 3
    records = [40 / s["sample_rate"] for s in sites]
    assert sum(records) == pytest.approx(1100) and all(n == pytest.approx(round(n)) for n in records)
    by_rate = sorted(sites, key=lambda s: s["sample_rate"])
    assert [s["noise_multiplier"] for s in by_rate] == sorted(s["noise_multiplier"] for s in sites)


def test_sample_rate_follows_from_the_batch_size_and_the_records(finished: Callable[..., Finished]) -> None:
    rates = [s["sample_rate"] for s in finished().summary["sites"].values()]
    assert rates == [40 / 367, 40 / 367, 40 / 366]
