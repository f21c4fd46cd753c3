"""The contract of the messages: what a server accepts, and what really travels."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from lalora_flwr.ground.errors import SiteRefusal
from lalora_flwr.methods.transport import PLAIN
from lalora_flwr.wire import public
from lalora_flwr.wire.orders import ARRAYS, CONFIG, EvaluateOrder, TrainOrder
from lalora_flwr.wire.replies import (
    COUNTERS,
    IDENTITY,
    PROFILE,
    SHARING,
    Counters,
    Identity,
    read_arrays,
    read_counters,
    read_identity,
)
from lalora_flwr.wire.tensors import BadReply, num_bytes, to_arrays, to_tensors
from tests.conftest import Finished, arrays_of, factors_of

SHAPES = {"x.lora_A.weight": (2, 3), "x.lora_B.weight": (4, 2)}
COUNTED: dict[str, Any] = {"steps": 4, "epsilon": 1.5, "noise-multiplier": 0.7, "sample-rate": 0.1, "seeded": 1}

METHODS_AND_FACTORS = [  # method, what travels down in any round, what travels up in round 1 and in round 2
    ("la-lora", {"A", "B"}, {"A", "B"}, {"A", "B"}),
    ("dp-lora", {"A", "B"}, {"A", "B"}, {"A", "B"}),
    ("ffa-lora", {"B"}, {"B"}, {"B"}),
    ("rolora", {"A", "B"}, {"B"}, {"A"}),
]


def arrays(**changed: Any) -> ArrayRecord:
    """The arrays of a good reply; ``A`` and ``B`` replace a tensor, None leaves it out."""
    values = {"A": np.full((2, 3), 0.5, np.float32), "B": np.full((4, 2), -2.0, np.float32), **changed}
    return ArrayRecord({f"x.lora_{factor}.weight": Array(value) for factor, value in values.items() if value is not None})


def reply(records: ArrayRecord | None = None, **counters: Any) -> RecordDict:
    counted = {name.replace("_", "-"): value for name, value in counters.items()}
    return RecordDict({ARRAYS: records or arrays(), COUNTERS: MetricRecord({**COUNTED, **counted})})


def read_reply(content: RecordDict, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Any], Counters]:
    return read_arrays(content, shapes, PLAIN.dtype, PLAIN.check), read_counters(content)


def with_nth(value: float) -> np.ndarray[Any, Any]:
    spoiled = np.zeros((4, 2), np.float32)
    spoiled[3, 1] = value
    return spoiled


def test_a_reply_that_keeps_the_contract_is_taken_apart() -> None:
    tensors, counters = read_reply(reply(), SHAPES)
    assert {name: (value.shape, value.dtype) for name, value in tensors.items()} == {
        name: (shape, np.float32) for name, shape in SHAPES.items()
    }
    assert (tensors["x.lora_A.weight"] == 0.5).all() and (tensors["x.lora_B.weight"] == -2.0).all()
    assert counters == Counters(4, 1.5, 0.7, 0.1, seeded=True)


def test_a_site_without_privacy_may_report_an_infinite_epsilon() -> None:
    assert read_reply(reply(epsilon=math.inf, noise_multiplier=0.0), SHAPES)[1].epsilon == math.inf


def archive() -> bytes:
    """What ``numpy.load`` opens, and gives no array for."""
    stream = io.BytesIO()
    np.savez(stream)
    return stream.getvalue()


BAD: dict[str, Callable[[], RecordDict]] = {
    "an extra record": lambda: RecordDict({**reply(), "loss": MetricRecord({"loss": 1.0})}),
    "an extra config record": lambda: RecordDict({**reply(), "notes": ConfigRecord({"note": "record 17"})}),
    "no counters": lambda: RecordDict({ARRAYS: arrays()}),
    "no arrays": lambda: RecordDict({COUNTERS: MetricRecord(COUNTED)}),
    "arrays that are metrics": lambda: RecordDict({ARRAYS: MetricRecord({"loss": 1.0}), COUNTERS: MetricRecord(COUNTED)}),
    "counters that are a config": lambda: RecordDict({ARRAYS: arrays(), COUNTERS: ConfigRecord(dict(COUNTED))}),
    "an extra tensor": lambda: reply(arrays(E=np.zeros((1,), np.float32))),
    "a missing tensor": lambda: reply(arrays(A=None)),
    "a wrong shape": lambda: reply(arrays(A=np.zeros((3, 2), np.float32))),
    "a wrong number of values": lambda: reply(arrays(B=np.zeros((4, 3), np.float32))),
    "an extra axis": lambda: reply(arrays(A=np.zeros((1, 2, 3), np.float32))),
    "float64": lambda: reply(arrays(A=np.zeros((2, 3), np.float64))),
    "float16": lambda: reply(arrays(B=np.zeros((4, 2), np.float16))),
    "integers": lambda: reply(arrays(A=np.zeros((2, 3), np.int32))),
    "a NaN": lambda: reply(arrays(B=with_nth(math.nan))),
    "an infinite value": lambda: reply(arrays(B=with_nth(math.inf))),
    "a negative infinite value": lambda: reply(arrays(B=with_nth(-math.inf))),
    "an absurdly large value": lambda: reply(arrays(B=with_nth(-1.1e4))),
    "an undeclared counter": lambda: reply(loss=0.3),
    "a missing counter": lambda: RecordDict({ARRAYS: arrays(), COUNTERS: MetricRecord({"steps": 4, "epsilon": 1.5})}),
    "a counter that is a list": lambda: reply(epsilon=[1.0, 2.0]),
    "an epsilon that is not a number": lambda: reply(epsilon=math.nan),
    "a negative epsilon": lambda: reply(epsilon=-1.0),
    "steps that are not a number": lambda: reply(steps=math.nan),
    "half a step": lambda: reply(steps=2.5),
    "half seeded": lambda: reply(seeded=0.5),
    "infinitely many steps": lambda: reply(steps=math.inf),
    "an infinite sample rate": lambda: reply(sample_rate=math.inf),
    "an array that cannot be read": lambda: reply(
        ArrayRecord({**arrays(), "x.lora_A.weight": Array("float32", (2, 3), "numpy.ndarray", b"not an array")})
    ),
    "an archive of arrays": lambda: reply(
        ArrayRecord({**arrays(), "x.lora_A.weight": Array("float32", (2, 3), "numpy.ndarray", archive())})
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_reply_is_rejected_for(what: str) -> None:
    with pytest.raises(BadReply):
        read_reply(BAD[what](), SHAPES)


class Closed(Array):
    """An array that nobody may decode."""

    def numpy(self) -> Any:
        pytest.fail("it was decoded")


def test_an_array_with_more_bytes_than_its_shape_needs_is_not_even_decoded() -> None:
    big = Closed("float32", (2, 3), "numpy.ndarray", bytes(10**6))
    with pytest.raises(BadReply, match="more bytes"):
        read_reply(reply(ArrayRecord({"x.lora_A.weight": big, "x.lora_B.weight": big})), SHAPES)


def test_an_identity_is_two_whole_numbers() -> None:
    assert read_identity(RecordDict({IDENTITY: MetricRecord({"site": 3, "sites": 8})})) == Identity(3, 8)
    said: dict[str, Any]
    for said in ({"site": 1}, {"site": 1.0, "sites": 2}, {"site": [1], "sites": [2]}, {"site": 1, "sites": 2, "more": 3}):
        with pytest.raises(BadReply):
            read_identity(RecordDict({IDENTITY: MetricRecord(said)}))
    with pytest.raises(BadReply):
        read_identity(RecordDict({IDENTITY: ConfigRecord({"site": 3, "sites": 8})}))


@pytest.mark.parametrize(
    ("said", "good"),
    [
        ({"name": "north", "records": 20}, True),
        ({"name": "north"}, False),
        ({"name": "north", "records": 20, "more": 1}, False),
        ({"name": "", "records": 20}, False),
        ({"name": "n" * 65, "records": 20}, False),
        ({"name": "a\nb", "records": 20}, False),
        ({"name": 3, "records": 20}, False),
        ({"name": "north", "records": 0}, False),
        ({"name": "north", "records": 10**10}, False),
        ({"name": "north", "records": 2.5}, False),
    ],
)
def test_who_can_sum_says_its_name_and_how_many_records_it_declares(said: dict[str, Any], good: bool) -> None:
    told = RecordDict({IDENTITY: MetricRecord({"site": -1, "sites": -1}), SHARING: ConfigRecord(said)})
    if good:
        assert read_identity(told) == Identity(-1, -1, "", "north", 20)
    else:
        with pytest.raises(BadReply, match="its name and its number of records are not the declared ones"):
            read_identity(told)


@pytest.mark.parametrize(
    ("words", "good"), [("rank=2", True), ("", True), ("x" * 1000, True), ("x" * 1001, False), (3, False), (["a"], False)]
)
def test_a_profile_is_a_short_text(words: Any, good: bool) -> None:
    said = RecordDict({IDENTITY: MetricRecord({"site": -1, "sites": -1}), PROFILE: ConfigRecord({"words": words})})
    if good:
        assert read_identity(said) == Identity(-1, -1, words)
    else:
        with pytest.raises(BadReply):
            read_identity(said)


def test_an_order_survives_the_way() -> None:
    order = TrainOrder(3, "abc", "def", 7, 2, {"layers": ["x", 1, 0.5, None, True]}, {"sites": {"a": [1]}})
    assert TrainOrder.of(RecordDict({CONFIG: order.to_record()})) == order
    evaluation = EvaluateOrder(4, "def")
    assert EvaluateOrder.of(RecordDict({CONFIG: evaluation.to_record()})) == evaluation


GOOD_ORDER: dict[str, Any] = dict(TrainOrder(1, "abc", "def").to_record())
BAD_ORDERS: dict[str, dict[str, Any]] = {
    "another key": {**GOOD_ORDER, "schedule": "A"},
    "a key less": {name: value for name, value in GOOD_ORDER.items() if name != "exchange"},
    "round 0": {**GOOD_ORDER, "server-round": 0},
    "half a round": {**GOOD_ORDER, "server-round": 1.5},
    "fewer than no steps": {**GOOD_ORDER, "counted-steps": -1},
    "a digest that is a number": {**GOOD_ORDER, "adapter-digest": 3},
    "a directive that is a list": {**GOOD_ORDER, "directive": "[1]"},
    "a directive that is no JSON": {**GOOD_ORDER, "directive": "{"},
    "a directive that is not finite": {**GOOD_ORDER, "directive": '{"a": NaN}'},
    "a directive without end": {**GOOD_ORDER, "directive": "[" * 10**5},
    "a directive of bytes": {**GOOD_ORDER, "directive": b"{}"},
    "a long exchange": {**GOOD_ORDER, "exchange": '{"a": "' + "x" * public.LONGEST + '"}'},
}


@pytest.mark.parametrize("what", BAD_ORDERS)
def test_an_order_with(what: str) -> None:
    with pytest.raises(SiteRefusal, match=r"^order: [^0-9]*$"):
        TrainOrder.of(RecordDict({CONFIG: ConfigRecord(BAD_ORDERS[what])}))


def test_a_message_that_is_no_public_one_is_not_written() -> None:
    for bad in ({"a": math.nan}, {"a": "x" * public.LONGEST}):
        with pytest.raises(ValueError):
            public.written(bad)


def test_counters_survive_the_way() -> None:
    for counters in (Counters(4, 1.5, 0.7, 0.1, seeded=True), Counters(0, math.inf, 0.0, 1.0, seeded=False)):
        assert Counters.from_record(counters.to_record()) == counters


def test_tensors_travel_as_float32_whatever_they_were() -> None:
    state = {"b": torch.ones(2, dtype=torch.bfloat16, requires_grad=True), "a": torch.full((1, 2), 0.1, dtype=torch.float64)}
    sent = to_arrays(state)
    assert list(sent) == ["a", "b"]
    back = to_tensors(sent)
    assert {t.dtype for t in back.values()} == {torch.float32}
    assert torch.equal(back["a"], torch.full((1, 2), 0.1)) and torch.equal(back["b"], torch.ones(2))


def test_bytes_are_those_of_the_arrays_as_they_are_sent() -> None:
    sent = to_arrays({"a": torch.zeros(10, 7), "b": torch.zeros(3)})
    assert num_bytes(sent) == sum(len(array.data) for array in sent.values()) == (10 * 7 + 3) * 4 + 2 * 128


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("method", METHODS_AND_FACTORS, ids=lambda method: method[0])
def test_only_the_methods_tensors_and_the_declared_counters_travel(
    method: tuple[str, set[str], set[str], set[str]], head: str, finished: Callable[..., Finished]
) -> None:
    strategy, down, *up = method
    run = finished(strategy=strategy, lora__head=head)
    extra = {"head"} if head == "trained" else set()
    every = run.checkpoint
    for server_round in (1, 2):
        exchanged = run.spy.training(server_round)
        assert len(exchanged) == 3
        for order, answer in exchanged:
            assert set(order.content) == {ARRAYS, CONFIG}
            assert set(order.content[CONFIG]) == {
                *(
                    "server-round",
                    "adapter-digest",
                    "model-digest",
                    "counted-steps",
                    "counted-before",
                    "directive",
                    "exchange",
                    "own",
                ),
            }
            assert set(arrays_of(order)) == {n for n in every if factors_of([n]) <= down | extra}
            assert set(answer.content) == {ARRAYS, COUNTERS}
            assert set(answer.content[COUNTERS]) == set(COUNTED)
            assert set(arrays_of(answer)) == {n for n in every if factors_of([n]) <= up[server_round - 1] | extra}


def test_besides_training_a_site_is_only_asked_who_it_is(finished: Callable[..., Finished]) -> None:
    exchange = finished(strategy="la-lora").spy.exchange
    others = [(order, answer) for order, answer in exchange if order.metadata.message_type != "train"]
    assert {order.metadata.message_type for order, _ in others} == {"query.identity"} and len(others) == 3
    for site, (order, answer) in enumerate(others):
        assert not order.content
        assert {name: dict(record) for name, record in answer.content.items()} == {IDENTITY: {"site": site, "sites": 3}}


@pytest.mark.parametrize("method", METHODS_AND_FACTORS, ids=lambda method: method[0])
def test_reported_bytes_are_those_of_the_messages(
    method: tuple[str, set[str], set[str], set[str]], finished: Callable[..., Finished]
) -> None:
    run = finished(strategy=method[0])
    for line in run.metrics:
        orders, answers = zip(*run.spy.training(line["round"]), strict=True)
        for name, messages in (("bytes_down", orders), ("bytes_up", answers)):
            assert line[name] == sum(len(array.data) for m in messages for array in m.content[ARRAYS].values())
    for name in ("bytes_down", "bytes_up"):
        assert run.summary[name] == sum(line[name] for line in run.metrics)
