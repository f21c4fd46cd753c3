"""The ClientApp: parse, call, reply. What fails on a site reaches the server only as a fixed reason."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from lalora_flwr.engines.bundle import check_enforced
from lalora_flwr.errors import ConfigError, LedgerError, SiteRefusal
from lalora_flwr.messages import IDENTITY

log = logging.getLogger("lalora_flwr.site")
APP_ERROR = 2  # Flower's code for an exception in a ClientApp

app = ClientApp()


def answer(work: Callable[[RecordDict, Context], RecordDict], message: Message, context: Context) -> Message:
    """Reply with the result of ``work``, or with a fixed reason; never with an exception's text, which may quote data.

    The error is returned, not raised: Flower keeps the site's state only if the handler returns, and the steps taken
    before the failure must stay counted.
    """
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
    except Exception:
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
        from lalora_flwr import site  # heavy imports only when there is work, and where a failing one is replaced too

        if not site.in_simulation():
            _log_with_flower()
        check_enforced(context.node_config)
        return site.train(content, context)

    return answer(work, message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate on the site's own records, if run and site allow this leak."""

    def work(content: RecordDict, context: Context) -> RecordDict:
        from lalora_flwr.site_evaluation import evaluate_on_site

        check_enforced(context.node_config)
        return evaluate_on_site(content, context)

    return answer(work, message, context)


@app.query("identity")
def identity(message: Message, context: Context) -> Message:
    """Tell the virtual site's number and how many there are; -1 for a real site, which its node id identifies."""
    number = int(context.node_config.get("partition-id", -1))
    count = int(context.node_config.get("num-partitions", -1))
    return Message(RecordDict({IDENTITY: MetricRecord({"site": number, "sites": count})}), reply_to=message)
