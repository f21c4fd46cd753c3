"""Frames between short process and trainer, whatever the peer sends."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from flwr.app import RecordDict
from hypothesis import given
from hypothesis import strategies as st

from lalora_flwr.site.resident.frames import LIMITS, NONCE, BadFrame, Kind, pack, receive, send, unpack
from lalora_flwr.site.resident.words import Order, Told, answer_of, answer_to_bytes
from tests.site.resident.trainers import content, context

NOW = 0.2


@given(st.lists(st.binary(max_size=200), max_size=6))
def test_parts_come_back(parts: list[bytes]) -> None:
    assert unpack(pack(*parts), len(parts)) == parts


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=4), st.data())
def test_a_payload_that_is_cut_or_longer_is_refused(parts: list[bytes], data: st.DataObject) -> None:
    whole = pack(*parts)
    cut = data.draw(st.integers(0, len(whole) - 1))
    for wrong in (whole[:cut], whole + b"x"):
        with pytest.raises(BadFrame):
            unpack(wrong, len(parts))


@given(st.binary(max_size=300), st.integers(0, 6))
def test_no_bytes_make_anything_but_parts_or_a_bad_frame(payload: bytes, count: int) -> None:
    with suppress(BadFrame):
        assert pack(*unpack(payload, count)) == payload


@given(st.sampled_from([Kind.ORDER, Kind.ANSWER]), st.binary(max_size=5000))
def test_a_frame_comes_back(kind: Kind, payload: bytes) -> None:
    one, other = socket.socketpair()
    with one, other:
        send(one, kind, payload, 5)
        assert receive(other, [Kind.WORKING, kind], 5) == (kind, payload)


@given(st.binary(max_size=40))
def test_random_bytes_make_a_bad_frame_or_a_whole_one(sent: bytes) -> None:
    one, other = socket.socketpair()
    with other:
        with one:
            one.sendall(sent)
        with suppress(BadFrame):
            kind, payload = receive(other, list(Kind), 5)
            assert len(payload) <= LIMITS[kind]


@pytest.mark.parametrize("sent", [b"", b"\x01", b"\x06" + (2**40).to_bytes(8, "big"), b"\x06" + (9).to_bytes(8, "big") + b"half"])
def test_a_silent_peer_a_half_frame_and_a_giant_one_end_in_time(sent: bytes) -> None:
    one, other = socket.socketpair()
    with one, other:
        one.sendall(sent)
        begun = time.monotonic()
        with pytest.raises(BadFrame):
            receive(other, [Kind.ANSWER], NOW)
        assert time.monotonic() - begun < NOW + 1


def test_what_is_announced_is_not_reserved() -> None:
    """A frame of the largest size, of which nothing follows, takes no memory."""
    import tracemalloc

    one, other = socket.socketpair()
    with one, other:
        one.sendall(b"\x06" + LIMITS[Kind.ANSWER].to_bytes(8, "big"))
        tracemalloc.start()
        with pytest.raises(BadFrame):
            receive(other, [Kind.ANSWER], NOW)
        assert tracemalloc.get_traced_memory()[1] < 2**22
        tracemalloc.stop()


def test_too_much_is_not_even_sent() -> None:
    one, other = socket.socketpair()
    with one, other, pytest.raises(BadFrame, match="too long"):
        send(one, Kind.WORKING, b"x", NOW)


def test_orders_and_answers_come_back_as_they_were() -> None:
    order = Order(b"n" * NONCE, "train", content(3), context(a=1, b=1.0, c=True, d="x"))
    order.context.state["memory"] = content(4)["counters"]
    back = Order.of(order.to_bytes())
    assert back.nonce == order.nonce and back.kind == "train" and back.content == order.content
    assert vars(back.context) == vars(order.context)
    types = {key: type(value) for key, value in back.context.node_config.items()}
    assert types == {key: type(value) for key, value in order.context.node_config.items()}
    for told in (Told(content(), every=5.0), Told(None, "budget: spent", 0.0), Told(RecordDict())):
        assert answer_of(answer_to_bytes(order.nonce, told, order.context.state), order.nonce) == (told, order.context.state)


@given(st.binary(max_size=200))
def test_nothing_but_protobuf_is_read(payload: bytes) -> None:
    for text in (payload, pack(b"n" * NONCE, b"train", payload, payload), pack(b"n" * NONCE, payload, b"", b"")):
        for read in (Order.of, lambda text: answer_of(text, b"n" * NONCE)):
            with suppress(BadFrame):
                read(text)


def test_a_machine_that_was_stopped_past_a_deadline_gets_what_was_said_before_it_gives_up() -> None:
    """As after a frozen container: the time is over, and half of a frame has come."""
    one, other = socket.socketpair()
    whole = b"\x06" + (4).to_bytes(8, "big") + b"done"

    def later() -> None:
        one.sendall(whole[:5])
        time.sleep(1.5 * NOW)
        one.sendall(whole[5:])

    with one, other, ThreadPoolExecutor(1) as pool:
        done = pool.submit(later)
        assert receive(other, [Kind.ANSWER], NOW, again=1) == (Kind.ANSWER, b"done")
        done.result()
        begun = time.monotonic()
        with pytest.raises(BadFrame, match="silent"):
            receive(other, [Kind.ANSWER], NOW, again=1)
        assert 2 * NOW <= time.monotonic() - begun < 2 * NOW + 1
