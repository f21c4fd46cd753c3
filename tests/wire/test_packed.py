"""The arrays of a message as one."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import save

from lalora_flwr.wire.packed import WHOLE, BadPack, is_packed, packed, unpacked

TYPES = st.sampled_from([np.float32, np.uint64, np.int64, np.uint8])
VALUES = TYPES.flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, min_side=0, max_side=3)))


@given(
    st.dictionaries(st.text(min_size=1, max_size=5).filter(lambda name: name not in (WHOLE, "__metadata__")), VALUES, max_size=4)
)
def test_what_is_unpacked_is_what_was_packed(values: dict[str, np.ndarray]) -> None:
    content = RecordDict({"arrays": ArrayRecord({n: Array(v) for n, v in values.items()}), "config": ConfigRecord({"k": 1})})
    travels = packed(content)
    assert is_packed(travels) and not is_packed(content)
    assert len(travels.array_records["arrays"]) == 1 and travels["config"] == content["config"]
    found = unpacked(travels)
    assert found["config"] == content["config"] and set(found.array_records["arrays"]) == set(values)
    for name, value in values.items():
        got = found.array_records["arrays"][name].numpy()
        assert (got.dtype, got.shape, got.tobytes()) == (value.dtype, value.shape, value.tobytes())


def test_a_transposed_tensor_keeps_its_values() -> None:
    value = np.arange(6, dtype=np.float32).reshape(2, 3).T
    found = unpacked(packed(RecordDict({"arrays": ArrayRecord({"a": Array(value)})})))
    assert np.array_equal(found.array_records["arrays"]["a"].numpy(), value)


def test_content_that_is_not_packed_stays_as_it_is() -> None:
    content = RecordDict({"arrays": ArrayRecord({"a": Array(np.zeros(2, dtype=np.float32))})})
    assert unpacked(content) == content


@pytest.mark.parametrize(
    "whole",
    [
        np.zeros(3, dtype=np.float32),
        np.zeros((2, 2), dtype=np.uint8),
        np.zeros(0, dtype=np.uint8),
        np.frombuffer(save({"a": np.zeros(9, dtype=np.float32)})[:-1], dtype=np.uint8),
        np.frombuffer(b"\xff" * 64, dtype=np.uint8),
        np.frombuffer((2**23 + 8).to_bytes(8, "little") + b"{}".ljust(2**23 + 8), dtype=np.uint8),
    ],
)
def test_bytes_that_are_no_arrays_are_refused(whole: np.ndarray) -> None:
    with pytest.raises(BadPack, match="cannot be read"):
        unpacked(RecordDict({"arrays": ArrayRecord({WHOLE: Array(whole)})}))


def test_an_array_that_flower_cannot_read_is_refused() -> None:
    broken = Array(dtype="uint8", shape=(3,), stype="numpy.ndarray", data=b"no array")
    with pytest.raises(BadPack):
        unpacked(RecordDict({"arrays": ArrayRecord({WHOLE: broken})}))


def test_a_record_that_several_messages_share_is_packed_once() -> None:
    shared = ArrayRecord({"a": Array(np.ones(3, dtype=np.float32))})
    made: dict[int, ArrayRecord] = {}
    first, second = (packed(RecordDict({"arrays": shared}), made) for _ in range(2))
    assert first["arrays"] is second["arrays"] and len(made) == 1
