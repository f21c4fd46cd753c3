"""What travels between the short process and the resident trainer: frames with a kind, a length and a deadline.

Guarantee: a peer that sends less than it announced, more than its kind may have, another kind than is due, or nothing, makes
`receive` raise within the deadline; memory grows with what has arrived, never with what was announced. Nothing is unpickled.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Collection
from enum import IntEnum

_HEAD = struct.Struct(">BQ")  # kind, and length of the payload
_LENGTH = struct.Struct(">Q")
_CHUNK = 2**20
DIGEST, NONCE = 32, 16  # bytes
LARGEST = 2**32  # bytes of an order or an answer; protobuf itself ends at 2^31 for each of their parts


class Kind(IntEnum):
    """In the order in which they travel."""

    HELLO = 1  # short process: the surroundings in which the message has to be served
    WELCOME = 2  # trainer: its own surroundings
    ORDER = 3  # short process: the message
    ACCEPTED = 4  # trainer: it has all of the order, and begins
    WORKING = 5  # trainer: now and then
    ANSWER = 6  # trainer: what the reply says


LIMITS = {
    Kind.HELLO: DIGEST,
    Kind.WELCOME: DIGEST,
    Kind.ORDER: LARGEST,
    Kind.ACCEPTED: NONCE,
    Kind.WORKING: 0,
    Kind.ANSWER: LARGEST,
}


class BadFrame(Exception):
    """The peer is gone, is late, or does not keep to the protocol."""


def send(connection: socket.socket, kind: Kind, payload: bytes, seconds: float) -> None:
    """
    Raises:
        BadFrame: the payload is too long for its kind, or the peer does not take it in so many seconds.
    """
    if len(payload) > LIMITS[kind]:
        raise BadFrame(f"{kind.name} of {len(payload)} bytes is too long")
    try:
        connection.settimeout(seconds)
        connection.sendall(_HEAD.pack(kind, len(payload)))
        connection.sendall(payload)
    except OSError as error:
        raise BadFrame(f"{kind.name} cannot be sent: {error}") from None


class _Deadline:
    """So many seconds from now, and as many more each time it is put off."""

    def __init__(self, seconds: float, times: int) -> None:
        self._seconds, self._times, self._end = seconds, times, time.monotonic() + seconds

    def left(self) -> float:
        """Seconds.

        Raises:
            BadFrame: it is over, and cannot be put off any more.
        """
        if (left := self._end - time.monotonic()) > 0:
            return left
        if not self._times:
            raise BadFrame("the peer is silent")
        self._times, self._end = self._times - 1, time.monotonic() + self._seconds
        return self._seconds


def receive(connection: socket.socket, due: Collection[Kind], seconds: float, *, again: int = 0) -> tuple[Kind, bytes]:
    """The next frame, which has to be whole in so many seconds.

    Args:
        connection: to the peer.
        due: what may come.
        seconds: to wait.
        again: how many times more. A machine that was stopped for a while wakes up with the deadline behind it, and the peer
            has yet to speak.

    Raises:
        BadFrame: there is none, or it is not one of those that are due.
    """
    end = _Deadline(seconds, again)
    number, length = _HEAD.unpack(_bytes(connection, _HEAD.size, end))
    kind = next((kind for kind in due if kind == number), None)
    if kind is None:
        raise BadFrame(f"a frame of kind {number} is not due")
    if length > LIMITS[kind]:
        raise BadFrame(f"{kind.name} of {length} bytes is too long")
    return kind, _bytes(connection, length, end)


def _bytes(connection: socket.socket, count: int, end: _Deadline) -> bytes:
    found = bytearray()
    while len(found) < count:
        try:
            connection.settimeout(end.left())
            chunk = connection.recv(min(_CHUNK, count - len(found)))
        except TimeoutError:
            continue
        except OSError as error:
            raise BadFrame(f"the peer is gone: {error}") from None
        if not chunk:
            raise BadFrame("the peer is gone")
        found += chunk
    return bytes(found)


def pack(*parts: bytes) -> bytes:
    """Several texts as one payload."""
    return b"".join(piece for part in parts for piece in (_LENGTH.pack(len(part)), part))


def unpack(payload: bytes, count: int) -> list[bytes]:
    """The ``count`` texts of `pack`.

    Raises:
        BadFrame: it holds fewer, more, or a part of one.
    """
    parts, at = [], 0
    for _ in range(count):
        if len(payload) - at < _LENGTH.size:
            raise BadFrame("a part is missing")
        (length,) = _LENGTH.unpack_from(payload, at)
        at += _LENGTH.size
        if len(payload) - at < length:
            raise BadFrame("a part is cut off")
        parts.append(payload[at : at + length])
        at += length
    if at != len(payload):
        raise BadFrame("something follows the last part")
    return parts
