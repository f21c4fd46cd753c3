"""How a run starts: sites that do not answer at once, or never, or come late."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
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


class DatedGrid(InlineGrid):
    """Of sites that Flower's simulation made in some order, one each microsecond."""

    order: tuple[int, ...] = tuple(range(40))

    def get_nodes(self) -> list[SimpleNamespace]:
        first, *_ = self.get_node_ids()
        return [
            SimpleNamespace(node_id=first + site, registered_at=f"2026-01-01T00:00:00.{place:06}")
            for place, site in enumerate(self.order)
        ]


@pytest.mark.parametrize(
    ("order", "greeted"),
    [
        (range(40), 3),
        ((1, 0, *range(2, 40)), 43),  # not the order of their numbers after all
        (range(39), 40),  # one is missing
    ],
    ids=["in order", "swapped", "missing"],
)
def test_many_virtual_sites_are_known_by_the_order_in_which_they_were_made(
    order: Iterable[int], greeted: int, tmp_path: Path
) -> None:
    settings, spy = small(tmp_path, num_supernodes=40), Spy()
    grid = DatedGrid(spy, 40, dict(flatten(settings)))  # type: ignore[arg-type]
    grid.order = tuple(order)
    roster = Roster(settings, real=False)
    roster.start_from(grid)
    assert [roster.site(node) for node in grid.get_node_ids()] == list(range(40)) and len(asked(spy)) == greeted
    assert len({order.metadata.dst_node_id for order, _ in spy.exchange}) == min(greeted, 40)


def test_few_sites_and_real_ones_are_all_greeted(tmp_path: Path) -> None:
    for sites, real in ((32, False), (40, True)):
        settings, spy = small(tmp_path, num_supernodes=sites), Spy()
        grid = DatedGrid(spy, sites, dict(flatten(settings)))  # type: ignore[arg-type]
        grid.order = tuple(range(sites))
        Roster(settings, real=real).start_from(grid)
        assert len(asked(spy)) == sites
