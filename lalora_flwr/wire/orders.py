"""What the server asks of a site."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, RecordDict

from lalora_flwr.ground.errors import SiteRefusal
from lalora_flwr.wire import public
from lalora_flwr.wire.public import Public

ARRAYS, CONFIG, MEMORY = "arrays", "config", "memory"
_DIGEST = re.compile(r"(?:[0-9a-f]{64})?")


@dataclass(frozen=True)
class TrainOrder:
    """What the server asks of a site in one round.

    Attributes:
        server_round: from 1.
        adapter_digest: of the whole adapter that the site must start from, as the site holds it.
        model_digest: of the frozen weights below it.
        counted_steps: most steps the site can have taken in the run before; it counts them, or more by its own ledger.
        counted_before: how many of them were for a ridge head, at the noise of that stage.
        directive: how the round is steered, in words of the method's schedule.
        exchange: what the method's transport tells the sites of the round.
        own: digest of the site's last reply that was merged, where slots stay at the site: it goes on from what it held then.
            Empty: none was.
    """

    server_round: int
    adapter_digest: str
    model_digest: str
    counted_steps: int = 0
    counted_before: int = 0
    directive: Public = field(default_factory=dict)
    exchange: Public = field(default_factory=dict)
    own: str = ""

    def to_record(self) -> ConfigRecord:
        return ConfigRecord(
            {
                "server-round": self.server_round,
                "adapter-digest": self.adapter_digest,
                "model-digest": self.model_digest,
                "counted-steps": self.counted_steps,
                "counted-before": self.counted_before,
                "directive": public.written(self.directive),
                "exchange": public.written(self.exchange),
                "own": self.own,
            }
        )

    @staticmethod
    def of(content: RecordDict) -> TrainOrder:
        """The order of a training message.

        Raises:
            SiteRefusal: with a fixed reason, if it is not one.
        """
        values = _config(content, {key.replace("_", "-") for key in TrainOrder.__dataclass_fields__})
        try:
            directive, exchange = public.read(values["directive"]), public.read(values["exchange"])
        except ValueError:
            raise SiteRefusal("order: its directive or its exchange is not a public message") from None
        return TrainOrder(
            _whole(values["server-round"], 1),
            _text(values["adapter-digest"]),
            _text(values["model-digest"]),
            _whole(values["counted-steps"], 0),
            _whole(values["counted-before"], 0),
            directive,
            exchange,
            _digest(values["own"]),
        )


@dataclass(frozen=True)
class EvaluateOrder:
    """What the server asks of a site that is to evaluate: the round just finished, the frozen weights, and ``own`` as in
    training.
    """

    server_round: int
    model_digest: str
    own: str = ""

    def to_record(self) -> ConfigRecord:
        return ConfigRecord({"server-round": self.server_round, "model-digest": self.model_digest, "own": self.own})

    @staticmethod
    def of(content: RecordDict) -> EvaluateOrder:
        """The order of an evaluation message.

        Raises:
            SiteRefusal: with a fixed reason, if it is not one.
        """
        values = _config(content, {"server-round", "model-digest", "own"})
        return EvaluateOrder(_whole(values["server-round"], 0), _text(values["model-digest"]), _digest(values["own"]))


def _config(content: RecordDict, keys: set[str]) -> dict[str, object]:
    record = content.get(CONFIG)
    if not isinstance(record, ConfigRecord) or set(record) != keys:
        raise SiteRefusal("order: its values are not the declared ones")
    return dict(record)


def _whole(value: object, least: int) -> int:
    if type(value) is not int or value < least:
        raise SiteRefusal("order: a number in it is not what it must be")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise SiteRefusal("order: a text in it is not what it must be")
    return value


def _digest(value: object) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise SiteRefusal("order: a digest in it is not what it must be")
    return value
