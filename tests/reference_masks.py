"""A secure sum's masks by the letter of RFC 5869 and RFC 8439, with hashlib alone: the slow twin of `wire.sharing`."""

from __future__ import annotations

import hashlib
import hmac
import struct


def hkdf_sha256(secret: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869 without a salt."""
    key, out, block = hmac.digest(bytes(32), secret, "sha256"), b"", b""
    for number in range(1, -(-length // 32) + 1):
        block = hmac.digest(key, block + info + bytes([number]), "sha256")
        out += block
    return out[:length]


def chacha20(key: bytes, length: int) -> bytes:
    """The stream of RFC 8439 from block 0 with a nonce of zeros."""
    out = b""
    for counter in range(-(-length // 64)):
        state = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *struct.unpack("<8I", key), counter, 0, 0, 0]
        out += struct.pack("<16I", *((a + b) & 0xFFFFFFFF for a, b in zip(state, _rounds(list(state)), strict=True)))
    return out[:length]


def _rounds(x: list[int]) -> list[int]:
    columns = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
    diagonals = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
    for _ in range(10):
        for a, b, c, d in (*columns, *diagonals):
            for first, second, third, by in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                x[first] = (x[first] + x[second]) & 0xFFFFFFFF
                x[third] ^= x[first]
                x[third] = ((x[third] << by) | (x[third] >> (32 - by))) & 0xFFFFFFFF
    return x


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
