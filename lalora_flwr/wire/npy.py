"""Arrays as Flower's `Array` holds them, ``.npy`` bytes, without numpy's parser for headers that were seen before.

A message holds a small array for each tensor, whose header costs numpy more than all that is done with its values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.lib import format as npy
from numpy.typing import NDArray

MAGIC = b"\x93NUMPY\x01\x00"
STYPE = "numpy.ndarray"  # Flower's word for these bytes
LONGEST = 1024  # bytes of a header that is remembered


def values_of(array: Array) -> NDArray[Any]:
    """What ``array.numpy()`` gives.

    Raises:
        ValueError: an archive of arrays, which numpy opens too; or values of no bytes each, of which a short message holds any
            number: a copy would take years, or all memory.
        Exception: whatever numpy makes of bytes that are no array.
    """
    data = array.data
    end = len(MAGIC) + 2 + int.from_bytes(data[len(MAGIC) : len(MAGIC) + 2], "little")
    if array.stype != STYPE or not data.startswith(MAGIC) or end > LONGEST:
        return _by_numpy(array)
    dtype, shape, by_columns = _read(data[:end])
    if not dtype.itemsize:
        raise ValueError(f"values of no bytes: {dtype}")
    if dtype.hasobject or by_columns or dtype.itemsize * math.prod(shape) > len(data) - end:
        return _by_numpy(array)
    return np.ndarray(shape, dtype, data, end).copy()


def _by_numpy(array: Array) -> NDArray[Any]:
    found = array.numpy()
    if not isinstance(found, np.ndarray):
        raise ValueError(f"no array: {type(found).__name__}")
    return found


def array_of(values: NDArray[Any]) -> Array:
    """What ``Array(values)`` is, to the byte."""
    if not values.flags.c_contiguous or values.dtype.hasobject:
        return Array(values)
    name, header = _written(values.dtype, values.shape)
    return Array(dtype=name, shape=values.shape, stype=STYPE, data=header + values.tobytes())


def record_of(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """What ``ArrayRecord({name: array_of(values), …})`` is, whose arrays are made once: Flower makes each anew for its record."""
    record = ArrayRecord()
    for name, values in arrays.items():
        record[name] = array_of(values)
    return record


@lru_cache(maxsize=512)
def _read(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """Type, shape, and whether the values lie column by column."""
    stream = BytesIO(header)
    npy.read_magic(stream)
    shape, by_columns, dtype = npy.read_array_header_1_0(stream)
    return dtype, shape, by_columns


@lru_cache(maxsize=512)
def _written(dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[str, bytes]:
    """The type's name and the header."""
    stream = BytesIO()
    npy.write_array_header_1_0(stream, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
    return str(dtype), stream.getvalue()
