"""How a run starts: sites that do not answer at once, or never, or come late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Error, Message

from lalora_flwr.engines.inline import InlineGrid
from lalora_flwr.ground.errors import RunFailed
from lalora_flwr.server.roster import IDENTITY_TRIES, Roster
from lalora_flwr.settings import flatten
from tests.conftest import AppCall, Finished, Spy, run_spied, small


def failing(times: int, site: int = 1) -> Spy:
    """A site that dies when it is asked for its number, so many times."""
    left = times

    def behaviour(message: Message, context: Context, app: AppCall) -> Message:
        nonlocal left
        if message.metadata.message_type == "query.identity" and context.node_config["partition-id"] == site and left:
            left -= 1
            return Message(Error(code=3, reason="node unavailable"), reply_to=message)
        return app(message, context)

    return Spy(behaviour)


def asked(spy: Spy) -> list[int]:
    """Node ids in the order in which they were asked for their numbers."""
    return [order.metadata.dst_node_id for order, _ in spy.exchange if order.metadata.message_type == "query.identity"]


def test_a_site_that_dies_when_it_is_greeted_is_asked_again_and_the_others_are_not(tmp_path: Path) -> None:
    settings, spy = small(tmp_path), failing(IDENTITY_TRIES - 1)
    run = Finished(run_spied(settings, spy), settings, spy)
    first, again = asked(spy)[:3], asked(spy)[3:]
    assert len(set(first)) == 3 and len(again) == IDENTITY_TRIES - 1 and set(again) == {first[1]}
    assert len(spy.training(1)) == 3 and run.summary["rounds"] == 2


def test_a_site_that_never_says_its_number_stops_the_run_before_training(tmp_path: Path) -> None:
    spy = failing(99)
    with pytest.raises(RunFailed, match=r"^1 of 3 sites did not answer the greeting: node unavailable$"):
        run_spied(small(tmp_path), spy)
    assert not spy.training(1) and len(asked(spy)) == 2 + IDENTITY_TRIES


class FewAtFirst(InlineGrid):
    """Of three sites, two are there from the start."""

    looks = 0

    def get_node_ids(self) -> list[int]:
        self.looks += 1
        return super().get_node_ids()[: 2 if self.looks < 6 else 3]


def test_while_a_run_waits_for_more_sites_each_is_asked_once(tmp_path: Path) -> None:
    spy: Any = failing(1)
    settings, waiting = small(tmp_path), []
    grid = FewAtFirst(spy, 3, dict(flatten(settings)))

    def sleep(seconds: float) -> None:
        waiting[:] = asked(spy)

    Roster(settings, real=False, patience=-1.0, sleep=sleep).start_from(grid)
    assert len(waiting) == len(set(waiting)) == 2
    again = asked(spy)[2:]
    assert len(again) == 2 and waiting[1] in again and waiting[0] not in again  # the silent one, and the late one
