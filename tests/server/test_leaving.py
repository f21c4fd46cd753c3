"""Sites that have no budget left, come late or go: the run goes on with the rest, down to a stated minimum."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Context, Error, Message, RecordDict

from lalora_flwr.engines.inline import InlineGrid
from lalora_flwr.ground.errors import RunFailed
from tests.conftest import AppCall, Finished, Spy, run_spied, small


def spent_from(limits: dict[int, int]) -> Callable[[Message, Context, AppCall], Message]:
    """Sites refuse for lack of budget from the given round on."""

    def behaviour(message: Message, context: Context, app: AppCall) -> Message:
        site = int(context.node_config["partition-id"])
        if message.metadata.message_type == "train" and int(message.content["config"]["server-round"]) >= limits.get(site, 10**9):
            return Message(Error(code=2, reason="budget: the steps would exceed it"), reply_to=message)
        return app(message, context)

    return behaviour


def test_a_site_without_budget_leaves_and_is_not_asked_again(tmp_path: Path) -> None:
    settings, spy = small(tmp_path, num_rounds=4, max_failures=0), Spy(spent_from({1: 2, 2: 3}))
    run = Finished(run_spied(settings, spy), settings, spy)
    assert [line["sites"] for line in run.metrics] == [3, 2, 1, 1]
    assert [line["left_sites"] for line in run.metrics] == [[], ["1"], ["2"], []]
    assert all(line["failures"] == 0 for line in run.metrics) and run.summary["failures"] == 0
    assert [len(spy.training(r)) for r in (1, 2, 3, 4)] == [3, 3, 2, 1]


def test_below_the_minimum_the_run_stops_and_says_so(tmp_path: Path) -> None:
    settings, spy = small(tmp_path, num_rounds=3, min_sites=2), Spy(spent_from({1: 2, 2: 2}))
    with pytest.raises(RunFailed, match=r"round 2: 0 of 3 sites failed and 2 left for lack of budget, min-sites = 2"):
        run_spied(settings, spy)


def test_when_all_have_left_the_run_stops(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"round 2: .*3 left for lack of budget, no site is left"):
        run_spied(small(tmp_path, num_rounds=3), Spy(spent_from({0: 2, 1: 2, 2: 2})))


def test_sites_that_have_left_stay_out_after_a_resume(tmp_path: Path) -> None:
    spy = Spy(spent_from({1: 1}))
    run_spied(small(tmp_path, num_rounds=2), spy)
    (tmp_path / "run" / "summary.json").unlink()
    settings, again = small(tmp_path, num_rounds=2, resume=True), Spy(spent_from({1: 1}))
    run = Finished(run_spied(settings, again), settings, again)
    assert not again.training(1) and not again.training(2)
    assert run.metrics[-1]["sites"] == 2 and run.summary["sites"].keys() == {"0", "2"}


def test_a_site_that_goes_and_comes_back_under_another_id_takes_part_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Site 2 is away in round 2; the node that serves it from round 3 on is new to the server, and so is its state."""
    settings, spy = small(tmp_path, num_rounds=4, max_failures=0), Spy()
    every = InlineGrid.get_node_ids

    def nodes(grid: InlineGrid) -> list[int]:
        first, second, third = every(grid)[:3]
        if not spy.training(1):
            return [first, second, third]
        if not spy.training(2):
            return [first, second]
        old = grid._contexts[third]  # of its order in round 1
        grid._contexts.setdefault(
            999, Context(run_id=1, node_id=999, node_config=old.node_config, state=RecordDict(), run_config=old.run_config)
        )
        return [first, second, 999]

    monkeypatch.setattr(InlineGrid, "get_node_ids", nodes)
    run = Finished(run_spied(settings, spy), settings, spy)
    assert [line["sites"] for line in run.metrics] == [3, 2, 3, 3]
    assert run.summary["sites"]["2"]["steps"] == 3 * settings.train.local_steps
