"""Damages bytes as disks, editors and attackers do."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

TIMES = int(os.environ.get("LALORA_FUZZ", "1"))  # how many times as many inputs as CI has time for
TOKENS = (
    b"\0",
    b"\xff",
    b"\n",
    b'"',
    b"'",
    b"[",
    b"{",
    b"}",
    b"=",
    b",",
    b"\\",
    b"1e999",
    b"-1",
    b"nan",
    b"null",
    b"99999999999999999999",
)


def damaged(data: bytes, draw: random.Random) -> bytes:
    """The bytes after one to four changes."""
    changes: tuple[Callable[[bytes], bytes], ...] = (
        lambda b: _at(b, draw, lambda old: bytes([old ^ 1 << draw.randrange(8)])),
        lambda b: _at(b, draw, lambda old: bytes([draw.randrange(256)])),
        lambda b: _cut(b, draw, b""),
        lambda b: _cut(b, draw, draw.choice(TOKENS)),
        lambda b: b[: draw.randrange(len(b) + 1)],
        lambda b: _twice(b, draw),
        lambda b: b + draw.randbytes(draw.randrange(1, 20)),
    )
    for _ in range(draw.randrange(1, 5)):
        data = draw.choice(changes)(data)
    return data


def _at(data: bytes, draw: random.Random, change: Callable[[int], bytes]) -> bytes:
    if not data:
        return data
    place = draw.randrange(len(data))
    return data[:place] + change(data[place]) + data[place + 1 :]


def _cut(data: bytes, draw: random.Random, new: bytes) -> bytes:
    first = draw.randrange(len(data) + 1)
    return data[:first] + new + data[first + draw.randrange(8) :]


def _twice(data: bytes, draw: random.Random) -> bytes:
    first = draw.randrange(len(data) + 1)
    part = data[first : first + draw.randrange(1, 40)]
    place = draw.randrange(len(data) + 1)
    return data[:place] + part + data[place:]
