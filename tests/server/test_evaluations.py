"""The sites' accuracies and the server's count of them; honest and drawn counters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lalora_flwr.engines.virtual_grid import FIRST_NODE
from lalora_flwr.privacy.accounting import epsilon_spent, noise_multiplier_for
from lalora_flwr.server.counts import SiteCounts
from lalora_flwr.wire.replies import SITE_METRICS, Counters, SiteMetrics
from lalora_flwr.wire.tensors import BadReply
from tests.conftest import AppCall, Finished, Spy, run_spied, small, strict_json
from tests.server.lies import STEPS, honest, lying

# evaluation on the sites


def evaluating(answer: dict[str, float]) -> Spy:
    """Real sites that answer an evaluation so."""
    real = lying(lambda _: None, reals=True).behaviour

    def behave(message: Message, context: Context, app: AppCall) -> Message:
        if message.metadata.message_type == "evaluate":
            return Message(RecordDict({SITE_METRICS: MetricRecord(answer)}), reply_to=message)
        return real(message, context, app)

    return Spy(behave)


def test_noised_accuracies_are_in_the_runs_epsilon_and_are_no_leak(tmp_path: Path) -> None:
    settings = small(tmp_path, evaluate_sites=True, evaluate_every=2, num_rounds=3)
    run = Finished(run_spied(settings, spy := evaluating({"accuracy": 0.5, "noise-multiplier": 4.0})), settings, spy)
    summary = run.summary
    assert summary["site_accuracy"] == 0.5 and "leaks" not in summary
    sigma, q = summary["noise_multiplier"], summary["sample_rate"]
    assert summary["epsilon"] == pytest.approx(epsilon_spent([(sigma, q, 6), (4.0, 1.0, 2)], 1e-4))
    assert summary["epsilon"] > epsilon_spent([(sigma, q, 6)], 1e-4) + 0.1
    assert {site["evaluations"] for site in summary["sites"].values()} == {2}
    asked = strict_json((run.path / "checkpoint" / "asked.json").read_text())
    assert asked == {str(FIRST_NODE + i): {"rounds": 3, "evaluations": 2} for i in range(3)}


@pytest.mark.parametrize(
    ("answer", "used"),
    [({"accuracy": 0.5, "loss": 1.0}, True), ({"accuracy": 0.5}, True), ({"accuracy": 0.5, "noise-multiplier": 1e-9}, False)],
    ids=str,
)
def test_an_accuracy_with_next_to_no_noise_is_a_leak_and_not_in_the_epsilon(
    answer: dict[str, float], used: bool, tmp_path: Path, finished: Callable[..., Finished]
) -> None:
    settings = small(tmp_path, evaluate_sites=True)
    run = Finished(run_spied(settings, spy := evaluating(answer)), settings, spy)
    assert "leaks" in run.summary and ("site_accuracy" in run.summary) is used
    assert run.summary["epsilon"] == finished().summary["epsilon"]


def test_an_evaluation_that_the_server_lost_counts_after_a_resume() -> None:
    settings = small(Path("x"))
    before, after = SiteCounts(settings, real=True), SiteCounts(settings, real=True)
    before.of(5).rounds, before.of(5).evaluations, before.of(5).heard = 1, 1, True
    before.check_evaluation(5, SiteMetrics(0.5, 4.0))
    after.restore(before.state(), {"5": {"rounds": 2, "evaluations": 2}})
    assert (after.of(5).rounds, after.of(5).evaluations, after.of(5).evaluation_noise) == (2, 2, 4.0)
    after.restore(before.state(), {})
    assert (after.of(5).rounds, after.of(5).evaluations) == (1, 1)


# whatever a site says

QUICK: dict[str, Any] = {"num_rounds": 5, "privacy__accountant": "rdp"}


RATES = [40 / n for n in (40, 41, 100, 367, 5000)]


@given(q=st.sampled_from(RATES), rounds=st.integers(1, 5))
def test_an_honest_site_is_believed_and_its_epsilon_is_the_servers(q: float, rounds: int) -> None:
    settings = small(Path("x"), **QUICK)
    counts = SiteCounts(settings)
    for served in range(1, rounds + 1):
        counts.of(3).rounds += 1
        counts.check(3, honest(settings, q, served))
        assert counts.epsilon() == counts.of(3).claimed_epsilon
    assert counts.most() == 3 and SiteCounts(settings, sites=counts.sites).report() == counts.report()


@pytest.mark.parametrize("q", [1.5, 0.0, 1e-300, 40 / 367 * 1.0001, 40 / 0.5, 40 / 1e10])
def test_a_sample_rate_of_no_number_of_records_is_rejected_at_once(q: float) -> None:
    counts, truth = SiteCounts(small(Path("x"), **QUICK)), honest(small(Path("x"), **QUICK), 40 / 367, 1)
    counts.of(0).rounds = 1
    with pytest.raises(BadReply, match="is no batch of 40 over a number of records"):
        counts.check(0, replace(truth, sample_rate=q))


@hypothesis_settings(max_examples=300)
@given(
    rounds=st.integers(1, 5),
    steps=st.integers(0, 12) | st.integers(0, 10**9),
    epsilon=st.floats(0, 5) | st.just(math.inf) | st.floats(0, allow_nan=False),
    factor=st.floats(0.9, 1.1) | st.floats(0, 1e9),
    q=st.sampled_from(RATES) | st.floats(0, 2),
    base=st.sampled_from(RATES),
    seeded=st.booleans(),
)
def test_whatever_a_site_says_the_runs_epsilon_is_at_most_the_target(
    rounds: int, steps: int, epsilon: float, factor: float, q: float, base: float, seeded: bool
) -> None:
    settings = small(Path("x"), **QUICK)
    counts, truth = SiteCounts(settings), honest(settings, base, rounds)
    counts.of(0).rounds = rounds
    claimed = Counters(steps, epsilon, truth.noise_multiplier * factor, q, seeded)
    try:
        counts.check(0, claimed)
    except BadReply:
        assert counts.epsilon() == 4.0 and counts.of(0).noise_multiplier is None
    else:
        assert seeded and rounds * STEPS <= steps <= 5 * STEPS and epsilon <= 4.0 * (1 + 1e-9) and q in RATES
        sigma = noise_multiplier_for(4.0, 1e-4, q, 5 * STEPS, "rdp")
        assert 0.99 * sigma <= claimed.noise_multiplier <= 1.02 * sigma
        assert counts.epsilon() == epsilon_spent([(claimed.noise_multiplier, q, rounds * STEPS)], 1e-4, "rdp")
    assert counts.epsilon() <= 4.0 * 1.02
