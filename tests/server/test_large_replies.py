"""Replies that are too large, reasons that are too long and identities that are none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict

from lalora_flwr.engines.inline import InlineGrid
from lalora_flwr.engines.virtual_grid import FIRST_NODE
from lalora_flwr.ground.errors import RunFailed
from lalora_flwr.server.roster import Roster
from lalora_flwr.server.strategy import FederatedStrategy
from lalora_flwr.settings import flatten
from lalora_flwr.wire.tensors import to_arrays
from tests.conftest import SITES, AppCall, Finished, Spy, arrays_of, run_spied, small
from tests.server.lies import LIAR, ROUNDS, lying, not_a_number, scaled
from tests.sites import servers_learner


def moved(run: Finished) -> float:
    """L2 distance of the last merge from what the sites were sent."""
    sent, *_ = [arrays_of(order) for order, _ in run.spy.training(ROUNDS)]
    return math.sqrt(sum(float((run.checkpoint[name].double() - sent[name].double()).square().sum()) for name in sent))


def test_a_reply_times_four_moves_the_mean_no_further_than_the_bound(tmp_path: Path) -> None:
    """It is no longer than an honest one could be."""

    def with_bound(bound: float) -> Finished:
        settings = small(tmp_path, run_name=f"bound-{bound}", merge__max_update_norm=bound)
        return Finished(run_spied(settings, spy := lying(scaled(4), 2)), settings, spy)

    free, bounded = with_bound(0.0), with_bound(0.5)
    assert [line["failures"] for line in free.metrics + bounded.metrics] == [0] * 4
    assert moved(free) > 1 and moved(bounded) <= 0.5 * (1 + 1e-5)


@pytest.mark.parametrize(("name", "trim"), [("median", 0.2), ("trimmed-mean", 0.34)])
def test_with_a_robust_merge_a_reply_times_a_thousand_stays_within_the_others(name: str, trim: float, tmp_path: Path) -> None:
    settings = small(tmp_path, merge__name=name, merge__trim=trim)
    run = Finished(run_spied(settings, spy := lying(scaled(-1000), 2)), settings, spy)
    assert run.metrics[-1]["failures"] == 0
    assert f"round 2: site {LIAR} stays, as merge.name = '{name}' needs all" in (run.path / "flower.log").read_text()
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
