"""A ClientApp: parse, call, reply. What fails on a site reaches the server only as a fixed reason."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from lalora_flwr.ground.errors import ConfigError, LedgerError, SiteRefusal
from lalora_flwr.ground.logs import json_logs
from lalora_flwr.site.bundle import check_enforced
from lalora_flwr.site.monitoring import noted
from lalora_flwr.site.resident.words import EVALUATE, FAILURE, TRAIN, Told
from lalora_flwr.wire.packed import BadPack, is_packed, packed, unpacked
from lalora_flwr.wire.replies import IDENTITY, LONGEST_WORDS, PROFILE, SHARING

if TYPE_CHECKING:
    from lalora_flwr.site.host import Host

log = logging.getLogger("lalora_flwr.site")
APP_ERROR = 2  # Flower's code for an exception in a ClientApp

Work = Callable[[RecordDict, Context], RecordDict]
SiteWork = Callable[["Host", RecordDict, Context], RecordDict]
Elsewhere = Callable[[str, RecordDict, Context], Told | None]  # serves a message in another process, or leaves it alone


def leaves_at(arrived: float, now: float, every: float) -> float:
    """When a reply that is ready ``now`` leaves: a whole number of times ``every`` seconds after its order ``arrived``.

    Guarantee: how long an answer took is known only to the next multiple of ``every``, which depends on the records as little
    as the owner makes it long. 0 lets replies leave when they are ready.
    """
    return arrived + every * max(1, math.ceil((now - arrived) / every)) if every > 0 else now


def answer(
    work: Work,
    message: Message,
    context: Context,
    every: Callable[[], float],
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
    elsewhere: Callable[[RecordDict, Context], Told | None] | None = None,
) -> Message:
    """Reply with the result of ``work``, or with a fixed reason; never with an exception's text, which may quote data.

    The error is returned, not raised: Flower keeps the site's state only if the handler returns, and the steps taken
    before the failure must stay counted.

    Args:
        work: makes the reply's content.
        message, context: Flower's.
        every: at multiples of how many seconds the reply leaves; a real site's ``answer-seconds``.
        clock, wait: seconds that go by, and waiting for them.
        elsewhere: is asked first, and serves the message or leaves it to ``work``; it takes its time from the same seconds.
    """
    arrived = clock()
    found = _elsewhere(elsewhere, message, context) or _done(work, message, context)
    reply = Message(found.content, reply_to=message) if found.content is not None else _error(found.reason, message)
    seconds = found.every
    if seconds is None:  # it was served here, or elsewhere by a process that died of it
        seconds = every()
        _note(context, found, clock() - arrived, seconds)
    now = clock()
    if (left := leaves_at(arrived, now, seconds) - now) > 0:
        wait(left)
    return reply


def told(kind: str, content: RecordDict, context: Context, host: Callable[[], Host]) -> Told:
    """What a real site's reply says to a message, and when it leaves; never raises but to end the process."""
    begun = time.monotonic()
    found = _told(_work(kind, host), content, context)
    every = _every(host, context)
    _note(context, found, time.monotonic() - begun, every)
    return dataclasses.replace(found, every=every)


def _note(context: Context, found: Told, took: float, every: float) -> None:
    """For the owner's monitoring; what it learns of the time is what the server sees."""
    noted(context.node_config, found.reason, leaves_at(0.0, took, every))


def _error(reason: str, message: Message) -> Message:
    return Message(Error(code=APP_ERROR, reason=reason), reply_to=message)


def _elsewhere(elsewhere: Callable[[RecordDict, Context], Told | None] | None, message: Message, context: Context) -> Told | None:
    if elsewhere is None or not message.has_content():
        return None
    try:
        return elsewhere(message.content, context)
    except Exception:  # it may have begun: the message is not served a second time
        log.exception("the site failed")
        return Told(None, FAILURE)


def _done(work: Work, message: Message, context: Context) -> Told:
    return _told(lambda content, context: work(message.content, context), RecordDict(), context)


def _told(work: Work, content: RecordDict, context: Context) -> Told:
    try:
        found = work(content, context)
        if not isinstance(found, RecordDict):
            raise TypeError(f"a site's work gives records, not {type(found).__name__}")
        return Told(found)
    except SiteRefusal as refusal:
        log.warning("the site refused: %s", refusal)
        reason = str(refusal)
    except LedgerError:
        log.exception("the site's ledger cannot be used")
        reason = "ledger: the site cannot use it; its own log says why"
    except ConfigError:
        log.exception("the site cannot use this configuration")
        reason = "configuration: the site cannot use it; its own log says why"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic of a Rust library is no Exception; unanswered it would tell something of the records
        log.exception("the site failed")
        reason = FAILURE
    return Told(None, reason)


class SiteApp(ClientApp):
    """A ClientApp that serves each message by itself, and says with what.

    Attributes:
        host: gives what its process hands to its sites, so that an engine can serve several of them at once.
    """

    def __init__(self, host: Callable[[], Host]) -> None:
        super().__init__()
        self.host = host


def make_client_app(host: Callable[[], Host], elsewhere: Elsewhere | None = None) -> SiteApp:
    """The ClientApp of a process.

    Args:
        host: gives what the process hands to its sites, each time the same object; called when there is work, since a site
            that is only asked who it is needs no torch. Under Ray it must be a function of a module, with ``functools.cache``:
            Flower sends the ClientApp itself to its workers, message by message, and what the app held would be lost.
        elsewhere: is asked first whether another process serves the message; a function of a module, too.
    """
    app = SiteApp(host)

    def served(kind: str, message: Message, context: Context) -> Message:
        asked = partial(elsewhere, kind) if elsewhere else None
        return answer(_work(kind, host), message, context, lambda: _every(host, context), elsewhere=asked)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return served(TRAIN, message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return served(EVALUATE, message, context)

    @app.query("identity")
    def identity(message: Message, context: Context) -> Message:
        return Message(_identity(context), reply_to=message)

    return app


def _work(kind: str, host: Callable[[], Host]) -> Work:
    """What is done with a message of this kind. It imports what it needs when it runs: that may fail, too."""

    def train(content: RecordDict, context: Context) -> RecordDict:
        from lalora_flwr.site.round import train

        _begin(host(), context)
        return as_asked(train, host(), content, context)

    def evaluate(content: RecordDict, context: Context) -> RecordDict:
        from lalora_flwr.site.evaluation import evaluate_on_site

        _begin(host(), context)
        return as_asked(evaluate_on_site, host(), content, context)

    return {TRAIN: train, EVALUATE: evaluate}[kind]


def as_asked(work: SiteWork, host: Host, content: RecordDict, context: Context) -> RecordDict:
    """The work on a message whose arrays may travel as one; the reply's then do so, too.

    Raises:
        SiteRefusal: the order's cannot be read.
    """
    if not is_packed(content):
        return work(host, content, context)
    try:
        order = unpacked(content)
    except BadPack:
        raise SiteRefusal("order: its tensors cannot be read") from None
    return packed(work(host, order, context))


def _identity(context: Context) -> RecordDict:
    """The virtual site's number and how many there are, -1 for a real site, which its node id identifies; and its profile."""
    number = int(context.node_config.get("partition-id", -1))
    count = int(context.node_config.get("num-partitions", -1))
    told = RecordDict({IDENTITY: MetricRecord({"site": number, "sites": count})})
    if name := _sharing_name(context.node_config):
        told[SHARING] = ConfigRecord({"name": name, "records": int(context.node_config.get("num-records", 0))})
    if words := str(context.node_config.get("profile", ""))[:LONGEST_WORDS]:
        told[PROFILE] = ConfigRecord({"words": words})
    return told


def _sharing_name(node_config: Mapping[str, bool | int | float | str]) -> str:
    """The site's name in its owner's roster; empty if it cannot take part in a secure sum."""
    if "sharing-key" not in node_config:
        return ""
    try:
        from lalora_flwr.site.sharing import read_secrets

        return read_secrets(str(node_config["sharing-key"]), str(node_config.get("sharing-roster", ""))).name
    except Exception:  # the owner's files, not records
        log.exception("the site has no part in secure sums")
        return ""


def _begin(host: Host, context: Context) -> None:
    """A real site says what it does, and only approved code goes on."""
    if not host.simulated:
        speak()
    check_enforced(context.node_config)


def speak() -> None:
    """A real site's own log goes where the SuperNode's goes, and in the same form."""
    with suppress(ValueError):  # a wrong word ends the SuperNode when it starts, and no message
        json_logs()
    log.setLevel(logging.INFO)
    for handler in logging.getLogger("flwr").handlers:
        log.addHandler(handler)  # once, however often it is added


def _every(host: Callable[[], Host], context: Context) -> float:
    try:
        return seconds_between(host().simulated, context.node_config)
    except Exception:  # the package cannot even be imported: no record was read
        return 0.0


def seconds_between(simulated: bool, node_config: Mapping[str, bool | int | float | str]) -> float:
    """At multiples of how many seconds after its order a reply leaves; 0 in a simulation: at once."""
    from lalora_flwr.ledger.caps import answer_seconds

    return 0.0 if simulated else answer_seconds(node_config)
