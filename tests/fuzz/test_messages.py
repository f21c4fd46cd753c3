"""Messages of any content: an order that can be read or a fixed refusal, a reply that can be read or a reason to reject it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from lalora_flwr.ground.errors import SiteRefusal
from lalora_flwr.methods.secure_sum import SecureSum
from lalora_flwr.wire.orders import ARRAYS, CONFIG, EvaluateOrder, TrainOrder
from lalora_flwr.wire.replies import (
    COUNTERS,
    IDENTITY,
    PROFILE,
    SHARING,
    SITE_METRICS,
    read_arrays,
    read_counters,
    read_identity,
    read_site_metrics,
)
from lalora_flwr.wire.tensors import BadReply
from tests.fuzz.mutator import TIMES

SPECIAL = st.sampled_from([0, 1, -1, 0.0, 1.0, float("nan"), float("inf")])
NUMBERS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(), SPECIAL)
TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(["", "{}", "[]", '{"a": 1}', '{"a": NaN}', "{" * 200, '{"attempt": 1}']))
VALUES = st.one_of(NUMBERS, st.booleans(), TEXTS, st.binary(max_size=9), st.lists(st.integers(0, 9), max_size=3))
ORDER = [key.replace("_", "-") for key in TrainOrder.__dataclass_fields__]
KEYS = st.sampled_from([*ORDER, "site", "sites", "name", "records", "words", "steps", "epsilon", "noise-multiplier"])
MORE = st.sampled_from(["sample-rate", "seeded", "accuracy", "loss", "noise", "other"])
CONFIGS = st.dictionaries(st.one_of(KEYS, MORE), VALUES, max_size=8).map(ConfigRecord)
WHOLE = st.fixed_dictionaries(dict.fromkeys(ORDER, VALUES)).map(ConfigRecord)
METRICS = st.dictionaries(st.one_of(KEYS, MORE), NUMBERS, max_size=6).map(MetricRecord)
SHAPES = st.sampled_from([(2, 3), (3, 2), (), (0,), (6,), (1, 2, 3)])
DTYPES = st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.uint64, np.bool_, np.complex64])


@st.composite
def arrays(draw: st.DrawFn) -> ArrayRecord:
    made = {}
    for name in draw(st.lists(st.sampled_from(["a", "b", "c", ""]), max_size=3, unique=True)):
        value = np.full(draw(SHAPES), draw(st.sampled_from([0, 1, 1e30, np.nan, np.inf])))
        with np.errstate(all="ignore"):
            made[name] = Array(value.astype(draw(DTYPES)))
    return ArrayRecord(made)


RECORDS = st.dictionaries(
    st.sampled_from([CONFIG, ARRAYS, COUNTERS, IDENTITY, SHARING, PROFILE, SITE_METRICS, "other"]),
    st.one_of(CONFIGS, WHOLE, METRICS, arrays()),
    max_size=4,
).map(RecordDict)
Read = Callable[[RecordDict], Any]
ORDERS: dict[str, Read] = {"train": TrainOrder.of, "evaluate": EvaluateOrder.of}
REPLIES: dict[str, Read] = {
    "counters": read_counters,
    "identity": read_identity,
    "accuracy": read_site_metrics,
    "arrays": lambda content: read_arrays(content, {"a": (2, 3), "b": (6,)}, np.float32, lambda name, value: None),
}


@pytest.mark.parametrize("kind", ORDERS)
@settings(max_examples=400 * TIMES, deadline=None)
@given(st.one_of(RECORDS, st.one_of(WHOLE, CONFIGS).map(lambda record: RecordDict({CONFIG: record}))))
def test_orders(kind: str, content: RecordDict) -> None:
    try:
        order = ORDERS[kind](content)
    except SiteRefusal as refusal:
        assert str(refusal).startswith("order: ")
        return
    assert order.to_record() == content[CONFIG]


@pytest.mark.parametrize("kind", REPLIES)
@settings(max_examples=300 * TIMES, deadline=None)
@given(RECORDS)
def test_replies(kind: str, content: RecordDict) -> None:
    try:
        REPLIES[kind](content)
    except BadReply as reason:
        assert str(reason).strip()


WORDS = st.sampled_from(["attempt", "sites", "share", "batch", "records", "x"])


@settings(max_examples=400 * TIMES, deadline=None)
@given(st.dictionaries(WORDS, st.one_of(VALUES, st.none()), max_size=6))
def test_words_of_a_secure_sum(words: dict[str, Any]) -> None:
    assert SecureSum().accepts(words) in (True, False)
