"""The order that a trainer gets and the answer that it gives, as bytes: Flower's own protobuf for records and context."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from flwr.app import Context, RecordDict
from flwr.common.serde import context_from_proto, context_to_proto, recorddict_from_proto, recorddict_to_proto
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from lalora_flwr.site.resident.frames import NONCE, BadFrame, pack, unpack

TRAIN, EVALUATE = "train", "evaluate"  # Flower's types of the messages that a site works for
FAILURE = "failure: the site's own log says why"  # the reason for whatever has no better one
LONGEST_REASON = 10_000  # letters


@dataclass(frozen=True)
class Told:
    """What a reply says.

    Attributes:
        content: the reply's; None for an error.
        reason: of the error: one of the fixed texts.
        every: at multiples of how many seconds the reply leaves; None: whoever replies has to find out.
    """

    content: RecordDict | None
    reason: str = ""
    every: float | None = None


@dataclass(frozen=True)
class Order:
    """A message as far as the work needs it. ``nonce``: known to nobody before; the answer has to repeat it."""

    nonce: bytes
    kind: str  # Flower's type of the message
    content: RecordDict
    context: Context

    def to_bytes(self) -> bytes:
        """
        Raises:
            ValueError: protobuf cannot hold it.
        """
        try:
            content, context = _written(self.content), bytes(context_to_proto(self.context).SerializeToString())
        except Exception as error:  # protobuf's own errors have no class in common
            raise ValueError(f"the message cannot be handed over: {type(error).__name__}") from None
        return pack(self.nonce, self.kind.encode(), content, context)

    @staticmethod
    def of(payload: bytes) -> Order:
        """
        Raises:
            BadFrame: it is none.
        """
        nonce, kind, content, context = unpack(payload, 4)
        if len(nonce) != NONCE or kind not in (TRAIN.encode(), EVALUATE.encode()):
            raise BadFrame("the order has no nonce, or a kind that is none")
        try:
            held = context_from_proto(ProtoContext.FromString(context))
            return Order(nonce, kind.decode(), _records(content), held)
        except Exception as error:  # whatever protobuf and Flower make of bytes that are none of theirs
            raise BadFrame(f"the order cannot be read: {type(error).__name__}") from None


def answer_to_bytes(nonce: bytes, told: Told, state: RecordDict) -> bytes:
    """An answer to the order of the nonce, with the state that Flower keeps for the site and the run."""
    head = json.dumps({"reason": told.reason, "every": told.every, "error": told.content is None})
    content = told.content if told.content is not None else RecordDict()
    return pack(nonce, head.encode(), _written(content), _written(state))


def answer_of(payload: bytes, nonce: bytes) -> tuple[Told, RecordDict]:
    """The answer to the order of this nonce, and the state.

    Raises:
        BadFrame: it is none, or answers another order.
    """
    its, head, content, state = unpack(payload, 4)
    if its != nonce:
        raise BadFrame("the answer is one to another order")
    try:
        words = json.loads(head)
        reason, every, error = words["reason"], words["every"], words["error"]
        kept, told = _records(state), None if error else _records(content)
    except Exception as fault:
        raise BadFrame(f"the answer cannot be read: {type(fault).__name__}") from None
    if not isinstance(reason, str) or len(reason) > LONGEST_REASON or bool(reason) != (told is None):
        raise BadFrame("the answer has no reason, or one that is none")
    if every is not None and (type(every) not in (int, float) or not 0 <= every < math.inf):
        raise BadFrame("the answer has no time")
    return Told(told, reason, every), kept


def _written(records: RecordDict) -> bytes:
    return bytes(recorddict_to_proto(records).SerializeToString())


def _records(content: bytes) -> RecordDict:
    return recorddict_from_proto(ProtoRecordDict.FromString(content))
