"""A grid of real sites: arrays travel as one, and a reply that cannot be read is an error of its site."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from lalora_flwr.server.watched import WatchedGrid
from lalora_flwr.wire.packed import WHOLE, packed, unpacked


@pytest.fixture(autouse=True)
def _stamps() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1  # Flower stamps messages with them


class Wires:
    """Sites behind a wire: what they are sent, and the answers they give at once."""

    def __init__(self, answers: dict[int, ArrayRecord]) -> None:
        self._answers, self._waiting = answers, list[Message]()
        self.sent: list[RecordDict] = []

    def get_nodes(self) -> list[Any]:
        return []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self._waiting = list(messages)
        for number, message in enumerate(self._waiting):
            message.metadata.__dict__["_message_id"] = str(number)
            self.sent.append(message.content)
        return [message.metadata.message_id for message in self._waiting]

    def pull_messages(self, ids: Sequence[str]) -> list[Message]:
        return [
            Message(RecordDict({"arrays": self._answers[order.metadata.dst_node_id]}), reply_to=order)
            for order in self._waiting
            if order.metadata.message_id in ids
        ]


def test_orders_are_packed_replies_unpacked_and_an_unreadable_one_fails_its_site() -> None:
    adapter = ArrayRecord({"A": Array(np.ones((2, 3), dtype=np.float32)), "B": Array(np.zeros(2, dtype=np.float32))})
    good = packed(RecordDict({"arrays": adapter})).array_records["arrays"]
    wires = Wires({1: good, 2: ArrayRecord({WHOLE: Array(np.frombuffer(b"\xff" * 40, dtype=np.uint8))}), 3: adapter})
    orders = [
        Message(RecordDict({"arrays": adapter, "config": ConfigRecord({"round": 1})}), dst_node_id=node, message_type="train")
        for node in (1, 2, 3)
    ]
    replies = {r.metadata.src_node_id: r for r in WatchedGrid(wires).send_and_receive(orders)}  # type: ignore[arg-type]
    for content in wires.sent:
        assert set(content.array_records["arrays"]) == {WHOLE} and content["config"] == {"round": 1}
        assert unpacked(content)["arrays"] == adapter
    assert replies[1].content["arrays"] == adapter and replies[3].content["arrays"] == adapter
    assert replies[2].has_error() and replies[2].error.reason == "its tensors cannot be read"
