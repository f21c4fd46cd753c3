"""Arrays read and written without numpy's parser: to the byte what Flower does."""

from __future__ import annotations

import io

import numpy as np
import pytest
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.lib import format as npy_format

from lalora_flwr.wire.npy import array_of, values_of

TYPES = st.sampled_from(["<f4", ">f4", "<f8", "<i8", "|u1", "|b1", "<f2", "<U3"])
ANY = TYPES.flatmap(lambda kind: arrays.arrays(np.dtype(kind), arrays.array_shapes(min_dims=0, min_side=0, max_side=4)))


@given(ANY, st.booleans())
def test_written_and_read_as_flower_does(values: np.ndarray, by_columns: bool) -> None:
    if by_columns:
        values = np.asfortranarray(values)
    mine, flowers = array_of(values), Array(values)
    assert (mine.dtype, mine.shape, mine.stype, mine.data) == (flowers.dtype, flowers.shape, flowers.stype, flowers.data)
    found, wanted = values_of(mine), flowers.numpy()
    assert found.dtype == wanted.dtype and found.shape == wanted.shape and found.tobytes() == wanted.tobytes()
    assert found.flags.writeable


def made(data: bytes, stype: str = "numpy.ndarray") -> Array:
    return Array(dtype="float32", shape=(2,), stype=stype, data=data)


def npy(values: np.ndarray, *, pickled: bool = False) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=pickled)
    return stream.getvalue()


GOOD = npy(np.arange(6, dtype=np.float32))
HEADER = GOOD[:-24]
BROKEN = {
    "nothing": b"",
    "no magic": b"x" * 200,
    "cut values": GOOD[:-1],
    "cut header": GOOD[:50],
    "another shape": GOOD.replace(b"(6,), }", b"(9,), }"),
    "a negative shape": GOOD.replace(b"(6,), }", b"(-6,),}"),
    "a shape beyond memory": GOOD.replace(b"(6,), }        ", b"(10**15,), }   "),
    "a long shape": GOOD.replace(b"(6,), }              ", b"(999999999999999,), }"),
    "code": GOOD.replace(b"(6,), }  ", b"(exit(),)}"[:9]),
    "objects": npy(np.array([{}, 1], dtype=object), pickled=True),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_flower_cannot_read_is_not_read(what: str) -> None:
    for _ in range(2):  # nothing wrong is remembered as right
        with pytest.raises(Exception):  # noqa: B017 - as numpy's, whatever they are
            made(BROKEN[what]).numpy()
        with pytest.raises(Exception):  # noqa: B017
            values_of(made(BROKEN[what]))


def test_an_archive_of_arrays_is_no_array() -> None:
    np.savez(stream := io.BytesIO(), np.zeros(6, np.float32))
    with pytest.raises(ValueError, match="no array: NpzFile"):
        values_of(made(stream.getvalue()))


def test_another_kind_of_bytes_is_not_read() -> None:
    with pytest.raises(TypeError, match="Unsupported"):
        values_of(made(GOOD, "pickle"))


@given(st.binary(max_size=60), st.integers(0, len(GOOD)))
def test_no_bytes_are_read_otherwise(junk: bytes, place: int) -> None:
    data = GOOD[:place] + junk + GOOD[place + len(junk) :]
    try:
        wanted = made(data).numpy()
    except Exception:
        with pytest.raises(Exception):  # noqa: B017
            values_of(made(data))
        return
    found = values_of(made(data))
    assert found.dtype == wanted.dtype and found.shape == wanted.shape and found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("kind", ["|V0", "|S0", "<U0"])
@pytest.mark.parametrize("count", [1, 10**13])
def test_values_of_no_bytes_are_not_read(kind: str, count: int) -> None:
    """128 bytes: a copy of so many would take years or terabytes, at a site and at a server alike."""
    stream = io.BytesIO()
    npy_format.write_array_header_1_0(stream, {"descr": kind, "fortran_order": False, "shape": (count,)})
    assert len(stream.getvalue()) == 128
    with pytest.raises(ValueError, match="values of no bytes"):
        values_of(made(stream.getvalue()))
