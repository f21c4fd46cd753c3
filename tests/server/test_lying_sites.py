"""Sites that lie to the server: what they say is rejected or bounded, the run goes on, and its ε is the server's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lalora_flwr.engines.inline import FIRST_NODE, InlineGrid
from lalora_flwr.ground.errors import RunFailed
from lalora_flwr.privacy.accounting import epsilon_spent, noise_multiplier_for
from lalora_flwr.server.counts import SiteCounts
from lalora_flwr.server.roster import Roster
from lalora_flwr.server.strategy import FederatedStrategy
from lalora_flwr.settings import Settings, flatten
from lalora_flwr.wire.orders import ARRAYS
from lalora_flwr.wire.replies import COUNTERS, SITE_METRICS, Counters, SiteMetrics
from lalora_flwr.wire.tensors import BadReply, to_arrays
from tests.conftest import SITES, AppCall, Finished, Spy, arrays_of, run_spied, small, strict_json
from tests.sites import servers_learner

LIAR = 1  # the site that lies
ROUNDS, STEPS = 2, 2
Lie = Callable[[RecordDict], None]


def lying(lie: Lie, *rounds: int, reals: bool = False) -> Spy:
    """One site that spoils its replies of some rounds; with ``reals`` the sites pass for real ones."""

    def behave(message: Message, context: Context, app: AppCall) -> Message:
        reply = app(message, context)
        kind = message.metadata.message_type
        if reals and kind == "query.identity":
            reply.content["identity"] = MetricRecord({"site": -1, "sites": -1})
        if kind == "train" and not reply.has_error():
            if reals:
                counters_of(reply.content)["seeded"] = 0
            if context.node_config["partition-id"] == LIAR and message.content["config"]["server-round"] in rounds:
                lie(reply.content)
        return reply

    return Spy(behave)


def counters_of(content: RecordDict) -> Any:
    return content[COUNTERS]


def says(**counters: float) -> Lie:
    """The reply with other counters."""

    def lie(content: RecordDict) -> None:
        counters_of(content).update({name.replace("_", "-"): value for name, value in counters.items()})

    return lie


def times(name: str, factor: float) -> Lie:
    def lie(content: RecordDict) -> None:
        counters_of(content)[name] *= factor

    return lie


def scaled(factor: float) -> Lie:
    """All tensors times a factor."""

    def lie(content: RecordDict) -> None:
        arrays: Any = content[ARRAYS]
        for name in arrays:
            arrays[name] = Array((arrays[name].numpy() * np.float32(factor)).astype(np.float32))

    return lie


def renamed(content: RecordDict) -> None:
    arrays: Any = content[ARRAYS]
    name = sorted(arrays)[0]
    arrays[name + ".x"] = arrays.pop(name)


def with_bytes(content: RecordDict) -> None:
    arrays: Any = content[ARRAYS]
    arrays[sorted(arrays)[0]].data += bytes(10**6)


def not_a_number(content: RecordDict) -> None:
    arrays: Any = content[ARRAYS]
    name = sorted(arrays)[0]
    arrays[name] = Array(np.full_like(arrays[name].numpy(), math.nan))


LIES: dict[str, tuple[Lie, str]] = {
    "epsilon = inf": (says(epsilon=math.inf), "epsilon is inf, above the run's 4"),
    "epsilon above the target": (says(epsilon=4.01), "above the run's 4"),
    "sigma too small": (times("noise-multiplier", 0.9), "noise multiplier"),
    "sigma too large": (times("noise-multiplier", 1.1), "noise multiplier"),
    "no noise": (says(noise_multiplier=0.0), "noise multiplier"),
    "no noise, and saying so": (says(noise_multiplier=0.0, epsilon=math.inf), "noise multiplier"),
    "the steps of the round before": (says(steps=STEPS), "counts 2 steps, not between the 4 it was asked for"),
    "no step": (says(steps=0), "counts 0 steps"),
    "too many steps": (says(steps=ROUNDS * STEPS + 1), "counts 5 steps"),
    "half a step": (says(steps=2.5), "no whole number"),
    "q above 1": (says(sample_rate=1.5), "sample rate"),
    "q = 0": (says(sample_rate=0.0), "sample rate"),
    "a tiny q": (says(sample_rate=1e-300), "sample rate"),
    "q of no number of records": (times("sample-rate", 1.0001), "sample rate"),
    "q of other records": (says(sample_rate=40 / 500), "sample rate changed"),
    "not seeded": (says(seeded=0), "not seeded"),
    "half seeded": (says(seeded=0.5), "seeded or not"),
    "a NaN": (not_a_number, "not finite"),
    "another name": (renamed, "not those asked for"),
    "a megabyte more": (with_bytes, "more bytes"),
    "tensors of millions": (scaled(1e8), "above"),
}


@pytest.mark.parametrize("what", LIES)
def test_a_lie_is_rejected_and_leaves_the_runs_epsilon_alone(
    what: str, tmp_path: Path, finished: Callable[..., Finished]
) -> None:
    """The liar told the truth in round 1, so the server knows its σ and q, and counts round 2 at those."""
    lie, said = LIES[what]
    spy, settings = lying(lie, 2), small(tmp_path)
    run, honest = Finished(run_spied(settings, spy), settings, spy), finished()
    first, second = run.metrics
    assert first["failures"] == 0 and first["epsilon"] == honest.metrics[0]["epsilon"]
    assert second["failed_sites"].keys() == {str(LIAR)} and said in second["failed_sites"][str(LIAR)]
    assert second["epsilon"] == run.summary["epsilon"] == honest.summary["epsilon"]
    assert {s: c["steps"] for s, c in run.summary["sites"].items()} == {"0": 4, "1": 4, "2": 4}
    good = [arrays_of(reply) for i, (_, reply) in enumerate(spy.training(2)) if i != LIAR]
    for name, value in run.checkpoint.items():
        np.testing.assert_allclose(value, (good[0][name].double() + good[1][name].double()) / 2, atol=1e-7)


@pytest.mark.parametrize("what", ["epsilon = inf", "no noise, and saying so", "q above 1", "too many steps"])
def test_a_site_that_never_tells_the_truth_counts_with_the_runs_target(what: str, tmp_path: Path) -> None:
    settings, spy = small(tmp_path), lying(LIES[what][0], 1, 2)
    run = Finished(run_spied(settings, spy), settings, spy)
    assert [line["failures"] for line in run.metrics] == [1, 1]
    assert [line["epsilon"] for line in run.metrics] == [4.0, 4.0] and run.summary["epsilon"] == 4.0
    liar = run.summary["sites"][str(LIAR)]
    assert (liar["steps"], liar["noise_multiplier"], liar["claimed_epsilon"]) == (4, None, None)


def test_a_liar_too_many_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"1 of 3 sites failed, max-failures = 0 \(site 1: reply rejected: its epsilon is inf"):
        run_spied(small(tmp_path, max_failures=0), lying(LIES["epsilon = inf"][0], 1))


def test_more_steps_than_asked_are_shown_and_not_counted(tmp_path: Path, finished: Callable[..., Finished]) -> None:
    """A site may count more by its own ledger, up to what its noise is calibrated for."""
    settings, spy = small(tmp_path), lying(says(steps=4, epsilon=3.99), 1)
    run = Finished(run_spied(settings, spy), settings, spy)
    assert [line["epsilon"] for line in run.metrics] == [line["epsilon"] for line in finished().metrics]
    assert run.summary["sites"][str(LIAR)]["claimed_steps"] == 4


def test_a_smaller_epsilon_than_the_servers_is_shown_and_not_believed(tmp_path: Path, finished: Callable[..., Finished]) -> None:
    settings, spy = small(tmp_path), lying(says(epsilon=0.0), 1, 2)
    run = Finished(run_spied(settings, spy), settings, spy)
    assert run.metrics[-1]["failures"] == 0 and run.summary["epsilon"] == finished().summary["epsilon"]
    liar = run.summary["sites"][str(LIAR)]
    assert liar["claimed_epsilon"] == 0.0 and liar["epsilon"] == pytest.approx(run.summary["epsilon"], rel=0.01)


def test_a_changed_sample_rate_is_rejected_even_with_the_right_noise(tmp_path: Path) -> None:
    q = 40 / 500
    sigma = noise_multiplier_for(4.0, 1e-4, q, ROUNDS * STEPS)
    settings, spy = small(tmp_path), lying(says(sample_rate=q, noise_multiplier=sigma), 2)
    run = Finished(run_spied(settings, spy), settings, spy)
    assert "its sample rate changed" in run.metrics[-1]["failed_sites"][str(LIAR)]


def test_a_real_site_with_seeded_noise_is_rejected(tmp_path: Path) -> None:
    settings, spy = small(tmp_path), lying(says(seeded=1), 2, reals=True)
    run = Finished(run_spied(settings, spy), settings, spy)
    assert [list(line["failed_sites"].values()) for line in run.metrics] == [[], ["reply rejected: its noise is seeded"]]
    assert run.summary["seeded"] is False and not any(site["seeded"] for site in run.summary["sites"].values())


def test_in_a_run_without_privacy_noise_is_a_lie(tmp_path: Path) -> None:
    settings, spy = small(tmp_path, privacy__epsilon=math.inf), lying(says(noise_multiplier=1.0, epsilon=1.0), 2)
    run = Finished(run_spied(settings, spy), settings, spy)
    assert "noise multiplier is 1, the run's target asks for 0" in run.metrics[-1]["failed_sites"][str(LIAR)]
    assert run.summary["epsilon"] is None and run.summary["private"] is False


def moved(run: Finished) -> float:
    """L2 distance of the last merge from what the sites were sent."""
    sent, *_ = [arrays_of(order) for order, _ in run.spy.training(ROUNDS)]
    return math.sqrt(sum(float((run.checkpoint[name].double() - sent[name].double()).square().sum()) for name in sent))


def test_a_reply_times_a_thousand_moves_the_mean_no_further_than_the_bound(tmp_path: Path) -> None:
    def with_bound(bound: float) -> Finished:
        settings = small(tmp_path, run_name=f"bound-{bound}", merge__max_update_norm=bound)
        return Finished(run_spied(settings, spy := lying(scaled(1000), 2)), settings, spy)

    free, bounded = with_bound(0.0), with_bound(0.5)
    assert [line["failures"] for line in free.metrics + bounded.metrics] == [0] * 4
    assert moved(free) > 50 and moved(bounded) <= 0.5 * (1 + 1e-5)


@pytest.mark.parametrize(("name", "trim"), [("median", 0.2), ("trimmed-mean", 0.34)])
def test_with_a_robust_merge_a_reply_times_a_thousand_stays_within_the_others(name: str, trim: float, tmp_path: Path) -> None:
    settings = small(tmp_path, merge__name=name, merge__trim=trim)
    run = Finished(run_spied(settings, spy := lying(scaled(-1000), 2)), settings, spy)
    assert run.metrics[-1]["failures"] == 0
    good = [arrays_of(reply) for i, (_, reply) in enumerate(spy.training(2)) if i != LIAR]
    for tensor, value in run.checkpoint.items():
        low, high = torch.minimum(good[0][tensor], good[1][tensor]), torch.maximum(good[0][tensor], good[1][tensor])
        assert bool(((low <= value) & (value <= high)).all())


def test_with_too_few_good_replies_for_the_merge_the_run_stops_and_says_what_is_needed(tmp_path: Path) -> None:
    settings, spy = small(tmp_path, merge__name="median"), lying(not_a_number, 2)
    with pytest.raises(RunFailed, match=r"round 2: 2 good replies, but merge.name = 'median' needs 3;"):
        run_spied(settings, spy)


# what real sites say of themselves


def errors(reason: str) -> Spy:
    def behave(message: Message, context: Context, app: AppCall) -> Message:
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == LIAR:
            return Message(Error(code=2, reason=reason), reply_to=message)
        return lying(lambda _: None, reals=True).behaviour(message, context, app)

    return Spy(behave)


def test_a_real_site_cannot_stop_the_run_by_naming_a_dead_worker(tmp_path: Path) -> None:
    settings, spy = small(tmp_path, num_rounds=1), errors("ActorDiedError")
    assert Finished(run_spied(settings, spy), settings, spy).metrics[0]["failed_sites"] == {
        str(FIRST_NODE + LIAR): "ActorDiedError"
    }


def test_a_sites_reason_is_kept_to_one_short_line(tmp_path: Path) -> None:
    settings, spy = small(tmp_path, num_rounds=1), errors("no\n\x0b  such " + "x" * 10**6)
    (reason,) = Finished(run_spied(settings, spy), settings, spy).metrics[0]["failed_sites"].values()
    assert reason.startswith("no such xxx") and len(reason) == 300


def test_a_real_site_is_its_node_whatever_number_it_claims(tmp_path: Path) -> None:
    settings = small(tmp_path)
    grid = InlineGrid(SITES, 3, dict(flatten(settings)))  # whose sites say the numbers 0, 1 and 2
    asked: list[dict[str, dict[str, int]]] = []
    learner, roster = servers_learner(settings), Roster(settings, real=True)
    strategy = FederatedStrategy(settings, learner.adapter.layout, lambda report: None, before_asking=asked.append, roster=roster)
    strategy.configure_train(1, to_arrays(learner.initial), ConfigRecord(), grid)
    assert asked == [{str(FIRST_NODE + i): {"rounds": 1, "evaluations": 0} for i in range(3)}]


@pytest.mark.parametrize("said", [{"site": -1}, {"site": 0.5, "sites": 3}, {"site": [1, 2], "sites": 3}], ids=str)
def test_a_site_with_no_usable_identity_does_not_start_the_run(said: dict[str, Any], tmp_path: Path) -> None:
    def behave(message: Message, context: Context, app: AppCall) -> Message:
        if message.metadata.message_type == "query.identity" and context.node_config["partition-id"] == LIAR:
            return Message(RecordDict({"identity": MetricRecord(said)}), reply_to=message)
        return app(message, context)

    with pytest.raises(RunFailed, match="1 of 3 sites did not answer the greeting: its identity is not"):
        run_spied(small(tmp_path), Spy(behave))


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


def honest(settings: Settings, q: float, rounds: int) -> Counters:
    privacy = settings.privacy
    sigma = noise_multiplier_for(privacy.epsilon, privacy.delta, q, settings.steps_per_site, privacy.accountant)
    steps = rounds * settings.train.local_steps
    return Counters(steps, epsilon_spent([(sigma, q, steps)], privacy.delta, privacy.accountant), sigma, q, seeded=True)


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
