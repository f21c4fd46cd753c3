"""A run goes on without sites that fail, up to as many as it may lose."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from lalora_flwr.engines.inline import InlineGrid
from lalora_flwr.engines.virtual_grid import FIRST_NODE
from lalora_flwr.ground.errors import RunFailed
from lalora_flwr.methods.merges import Memory, Merge, Merged, Now
from lalora_flwr.methods.updates import Tensors, Updates
from lalora_flwr.server.roster import Roster
from lalora_flwr.server.run import run_federation
from lalora_flwr.settings import flatten
from lalora_flwr.settings.choices import MERGES
from tests.conftest import (
    MODELS,
    SITES,
    AppCall,
    Finished,
    Spy,
    arrays_of,
    run_spied,
    small,
    strict_json,
)
from tests.server.federations import REASON, assert_equal, failing, mean_of, stopped


def test_a_run_goes_on_without_a_site_that_fails_and_says_which_and_why(tmp_path: Path) -> None:
    settings, spy = small(tmp_path), Spy(failing(1, rounds=[1]))
    run = Finished(run_spied(settings, spy), settings, spy)
    first, second = run.metrics
    assert (first["sites"], first["failures"], first["failed_sites"]) == (2, 1, {"1": REASON})
    assert (second["sites"], second["failures"], second["failed_sites"]) == (3, 0, {})
    assert run.summary["failures"] == 1
    good = [pair for pair in spy.training(1) if not pair[1].has_error()]
    assert_equal(arrays_of(spy.training(2)[0][0]), mean_of(good))


def test_failures_in_other_rounds_do_not_add_up_to_a_stop(tmp_path: Path) -> None:
    def one_a_round(message: Message, context: Context, app: AppCall) -> Message:
        server_round = message.content["config"]["server-round"] if message.content else 0
        return failing(server_round)(message, context, app)

    settings, spy = small(tmp_path, max_failures=1), Spy(one_a_round)
    assert Finished(run_spied(settings, spy), settings, spy).summary["failures"] == 2


@pytest.mark.parametrize(("allowed", "sites"), [(0, [2]), (1, [0, 2])])
def test_more_failures_than_allowed_stop_the_run(allowed: int, sites: list[int], tmp_path: Path) -> None:
    why = stopped(small(tmp_path, max_failures=allowed), Spy(failing(*sites)))
    assert why.startswith(f"round 1: {len(sites)} of 3 sites failed, max-failures = {allowed}")
    assert all(f"site {number}: {REASON}" in why for number in sites)


def test_a_run_that_stops_late_keeps_what_it_had(tmp_path: Path) -> None:
    why = stopped(small(tmp_path, max_failures=0), Spy(failing(0, rounds=[2])))
    assert why.startswith("round 2: ")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [strict_json(line)["round"] for line in lines] == [1]
    assert (tmp_path / "run" / "checkpoint" / "adapter.safetensors").exists()


def test_a_round_that_no_site_served_stops_the_run_whatever_is_allowed(tmp_path: Path) -> None:
    assert "no site is left" in stopped(small(tmp_path, max_failures=99), Spy(failing(0, 1, 2)))


class SilentGrid(InlineGrid):
    """A grid on which site 2 never answers a training order."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = super().send_and_receive(messages, timeout=timeout)
        silent = FIRST_NODE + 2
        return [m for m in replies if m.metadata.src_node_id != silent or m.metadata.message_type != "train"]


class SlowGrid(InlineGrid):
    """A grid on which site 2 takes a minute for a training order."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = super().send_and_receive(messages, timeout=timeout)
        slow = FIRST_NODE + 2 if (timeout or math.inf) < 60 else None
        return [m for m in replies if m.metadata.src_node_id != slow or m.metadata.message_type != "train"]


class ShuffledGrid(InlineGrid):
    """A grid on which replies arrive last site first."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return super().send_and_receive(messages, timeout=timeout)[::-1]


def on_grid(kind: type[InlineGrid], settings: Any, sites: int = 3) -> Finished:
    """A run on a grid with its own mind, as the inline engine would run it."""
    spy: Any = Spy()
    return Finished(run_federation(settings, kind(spy, sites, dict(flatten(settings))), models=MODELS), settings, spy)


def test_a_site_that_never_answers_counts_as_failed(tmp_path: Path) -> None:
    run = on_grid(SilentGrid, small(tmp_path))
    assert [line["failed_sites"] for line in run.metrics] == [{"2": "no reply"}] * 2
    assert run.summary["failures"] == 2
    with pytest.raises(RunFailed, match="site 2: no reply"):
        on_grid(SilentGrid, small(tmp_path, run_name="strict", max_failures=0))


def test_a_round_waits_no_longer_than_it_may_and_goes_on_with_who_was_there(tmp_path: Path) -> None:
    patient = on_grid(SlowGrid, small(tmp_path))
    assert [line["failures"] for line in patient.metrics] == [0, 0]
    run = on_grid(SlowGrid, small(tmp_path, run_name="busy", round_seconds=30))
    assert [line["failed_sites"] for line in run.metrics] == [{"2": "no reply"}] * 2
    assert run.summary["epsilon"] == pytest.approx(patient.summary["epsilon"], rel=1e-5)  # the late site has paid for its steps


class First(Merge):
    """Takes the first update, and notes all."""

    name = "first"

    def __init__(self) -> None:
        self.seen: list[list[bytes]] = []

    def __call__(self, current: Tensors, updates: Updates, memory: Memory, now: Now) -> Merged:
        each = [update.tensors for update in updates.each]
        self.seen.append([b"".join(tensors[name].tobytes() for name in sorted(tensors)) for tensors in each])
        return Merged({name: value.astype(np.float32) for name, value in each[0].items()})


class Broken(Merge):
    name = "broken"

    def __call__(self, *_: Any) -> Merged:
        raise ZeroDivisionError("oops")


FIRST = First()


MERGES.register("test-first", FIRST)


MERGES.register("test-broken", Broken())


def test_replies_are_merged_in_order_of_site_whatever_order_they_arrive_in(tmp_path: Path) -> None:
    FIRST.seen.clear()
    for name, kind in (("in-order", InlineGrid), ("shuffled", ShuffledGrid)):
        on_grid(kind, small(tmp_path, run_name=name, num_rounds=1, privacy__epsilon=math.inf, merge__name="test-first"))
    one, two = FIRST.seen
    assert one == two and len(set(one)) == 3


def test_another_number_of_sites_than_the_simulations_is_refused(tmp_path: Path) -> None:
    for sites in (2, 4):
        clock = itertools.count()  # a second passes whenever the server looks at it
        naps: list[float] = []

        def sleep(seconds: float, naps: list[float] = naps) -> None:
            naps.append(seconds)
            assert len(naps) < 100, "the server waits for sites that will never come"

        settings = small(tmp_path)
        grid = InlineGrid(SITES, sites, dict(flatten(settings)))
        roster = Roster(settings, real=False, clock=lambda clock=clock: float(next(clock)), sleep=sleep)
        with pytest.raises(RunFailed, match=f"num-supernodes = 3, but the simulation has {sites} sites"):
            roster.start_from(grid)


def test_a_bug_stops_the_run_and_the_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run_spied(small(tmp_path, merge__name="test-broken"), Spy())
    assert strict_json((tmp_path / "run" / "failure.json").read_text()) == {"error": "unexpected ZeroDivisionError: oops"}
