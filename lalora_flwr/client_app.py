"""The ClientApp: parse, call, reply. What fails on a site reaches the server only as a fixed reason."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from lalora_flwr.ground.errors import ConfigError, LedgerError, SiteRefusal
from lalora_flwr.site.bundle import check_enforced
from lalora_flwr.wire.messages import IDENTITY

log = logging.getLogger("lalora_flwr.site")
APP_ERROR = 2  # Flower's code for an exception in a ClientApp

app = ClientApp()


def leaves_at(arrived: float, now: float, every: float) -> float:
    """When a reply that is ready ``now`` leaves: a whole number of times ``every`` seconds after its order ``arrived``.

    Guarantee: how long an answer took is known only to the next multiple of ``every``, which depends on the records as little
    as the owner makes it long. 0 lets replies leave when they are ready.
    """
    return arrived + every * max(1, math.ceil((now - arrived) / every)) if every > 0 else now


def answer(
    work: Callable[[RecordDict, Context], RecordDict],
    message: Message,
    context: Context,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> Message:
    """Reply with the result of ``work``, or with a fixed reason; never with an exception's text, which may quote data.

    The error is returned, not raised: Flower keeps the site's state only if the handler returns, and the steps taken
    before the failure must stay counted. A real site's reply leaves at a multiple of its owner's ``answer-seconds``.
    """
    arrived = clock()
    reply = _answer(work, message, context)
    if (left := leaves_at(arrived, now := clock(), _answer_seconds(context)) - now) > 0:
        wait(left)
    return reply


def _answer_seconds(context: Context) -> float:
    """0 in a simulation, and if the package cannot even be imported: no record was read then."""
    try:
        from lalora_flwr.ledger.caps import answer_seconds
        from lalora_flwr.site import round as site
    except Exception:
        return 0.0
    return 0.0 if site.in_simulation() else answer_seconds(context.node_config)


def _answer(work: Callable[[RecordDict, Context], RecordDict], message: Message, context: Context) -> Message:
    try:
        return Message(work(message.content, context), reply_to=message)
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
        reason = "failure: the site's own log says why"
    return Message(Error(code=APP_ERROR, reason=reason), reply_to=message)


def _log_with_flower() -> None:
    """The site's own log goes where the SuperNode's goes."""
    log.setLevel(logging.INFO)
    for handler in logging.getLogger("flwr").handlers:
        log.addHandler(handler)  # once, however often it is added


@app.train()
def train(message: Message, context: Context) -> Message:
    """Serve one training round."""

    def work(content: RecordDict, context: Context) -> RecordDict:
        from lalora_flwr.site import (
            round as site,  # heavy imports only when there is work, and where a failing one is replaced too
        )

        if not site.in_simulation():
            _log_with_flower()
        check_enforced(context.node_config)
        return site.train(content, context)

    return answer(work, message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate on the site's own records, if run and site allow it."""

    def work(content: RecordDict, context: Context) -> RecordDict:
        from lalora_flwr.site import round as site
        from lalora_flwr.site.evaluation import evaluate_on_site

        if not site.in_simulation():
            _log_with_flower()
        check_enforced(context.node_config)
        return evaluate_on_site(content, context)

    return answer(work, message, context)


@app.query("identity")
def identity(message: Message, context: Context) -> Message:
    """Tell the virtual site's number and how many there are; -1 for a real site, which its node id identifies."""
    number = int(context.node_config.get("partition-id", -1))
    count = int(context.node_config.get("num-partitions", -1))
    return Message(RecordDict({IDENTITY: MetricRecord({"site": number, "sites": count})}), reply_to=message)
