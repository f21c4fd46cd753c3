"""A SuperNode that waits for a message instead of sleeping."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lalora_flwr.engines.receiving import LONGEST, eager


class Clock:
    def __init__(self) -> None:
        self.now, self.waits = 0.0, [0.0] * 0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


def connection(receive: Any) -> Any:
    @contextmanager
    def connect(address: str) -> Iterator[tuple[Any, ...]]:
        assert address == "superlink"
        yield (7, receive, "send", "get_run")

    return connect


def received(receive: Any, clock: Clock) -> Any:
    with eager(connection(receive), clock, clock.wait)("superlink") as functions:
        assert (functions[0], functions[2:]) == (7, ("send", "get_run"))
        return functions[1]()


def test_a_message_is_found_soon_after_it_came() -> None:
    clock = Clock()

    def receive() -> str | None:
        return "message" if clock.now >= 5 else None

    assert received(receive, clock) == "message"
    assert 5 <= clock.now <= 5 * 1.1 + 0.2
    assert len(clock.waits) < 25


def test_a_long_wait_is_as_rare_as_flowers_own_and_ends() -> None:
    clock = Clock()

    def receive() -> None:
        return None

    assert received(receive, clock) is None
    assert LONGEST <= clock.now < LONGEST + 3 and len(clock.waits) < LONGEST / 3 + 60


def test_what_flower_raises_passes() -> None:
    def receive() -> None:
        raise RuntimeError("not running")

    with pytest.raises(RuntimeError, match="not running"):
        received(receive, Clock())


def test_an_unknown_connection_is_left_alone() -> None:
    def other() -> None:
        return None

    with eager(connection(other))("superlink") as functions:
        assert functions[1] is other


def test_flowers_connection_has_the_form_that_is_known() -> None:
    import inspect

    from flwr.supernode import start_client_internal as supernode

    source = inspect.getsource(supernode.http_request_response)
    given = source[source.rindex("yield (") :]
    assert [word.strip() for word in given.split(",")[:3]] == ["yield (\n                node.node_id", "receive", "send"]
