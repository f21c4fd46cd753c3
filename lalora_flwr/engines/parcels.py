"""What travels between the server's process and a worker: orders of a round and the sites' answers, several at once.

An adapter that many sites are sent travels once in a parcel, and lies once in Ray's store where it is large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, Context, Error, Message, RecordDict

from lalora_flwr.engines.together import Order
from lalora_flwr.engines.virtual_grid import context_of
from lalora_flwr.settings import Value


@dataclass(frozen=True)
class Sent:
    """A site's order.

    Attributes:
        site: its number.
        kind: of the message.
        records: its content; a number stands for one of the arrays that sites have in common.
        state: of the site.
    """

    site: int
    kind: str
    records: Mapping[str, Any]
    state: RecordDict


@dataclass(frozen=True)
class Answer:
    """A site's answer.

    Attributes:
        said: content, or what went wrong.
        state: of the site, after it.
    """

    said: RecordDict | Error
    state: RecordDict


def common_arrays(orders: Sequence[Order]) -> list[ArrayRecord]:
    """The arrays that are in more than one message."""
    found: dict[int, ArrayRecord] = {}
    often: dict[int, ArrayRecord] = {}
    for message, _ in orders:
        for arrays in message.content.array_records.values():
            (often if id(arrays) in found else found)[id(arrays)] = arrays
    return list(often.values())


def sent(order: Order, common: Sequence[ArrayRecord]) -> Sent:
    """An order as it travels, ``common`` apart."""
    message, context = order
    places = {id(arrays): place for place, arrays in enumerate(common)}
    records = {name: places.get(id(record), record) for name, record in message.content.items()}
    return Sent(int(context.node_config["partition-id"]), message.metadata.message_type, records, context.state)


def order_of(travelled: Sent, common: Sequence[ArrayRecord], sites: int, run_config: dict[str, Value]) -> Order:
    """The order again, as one of a site that a worker serves.

    Args:
        common: as `sent` got it.
        sites: of the run.
        run_config: of the run.
    """
    records = {name: common[record] if isinstance(record, int) else record for name, record in travelled.records.items()}
    context = context_of(travelled.site, sites, run_config, travelled.state)
    return Message(RecordDict(records), dst_node_id=context.node_id, message_type=travelled.kind), context


def answer_of(reply: Message, context: Context) -> Answer:
    return Answer(reply.error if reply.has_error() else reply.content, context.state)


def reply_of(answer: Answer, order: Order) -> Message:
    """The reply, as the server reads it; the order's context is the site's after it."""
    message, context = order
    context.state = answer.state
    return replied(answer.said, message)


def replied(said: RecordDict | Error, message: Message) -> Message:
    return Message(said, reply_to=message)
