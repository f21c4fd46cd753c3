"""A Ray worker's body: serves orders to virtual sites, several in shared passes where that pays."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence

from flwr.app import ArrayRecord, Context, Error, Message, MessageType
from flwr.clientapp import ClientApp

from lalora_flwr.engines.parcels import Answer, Sent, answer_of, order_of, replied
from lalora_flwr.engines.together import SitesTogether, shared_passes
from lalora_flwr.engines.virtual_grid import stamp_messages
from lalora_flwr.settings import Value
from lalora_flwr.site.app import APP_ERROR
from lalora_flwr.site.resident.words import FAILURE

log = logging.getLogger("lalora_flwr.site")
Sharing = Callable[[ClientApp], SitesTogether | None]


def app_at(place: str) -> ClientApp:
    """A ClientApp by its place, ``module:attribute``."""
    module, _, attribute = place.partition(":")
    app: ClientApp = getattr(importlib.import_module(module), attribute)
    return app


class SiteWorker:
    """Serves the sites of a run with a ClientApp of its own."""

    def __init__(self, place: str, sharing: Sharing = shared_passes) -> None:
        """
        Args:
            place: of the ClientApp, ``module:attribute``.
            sharing: how it serves several sites at once, if it can.
        """
        stamp_messages()
        self._app, self._sharing = app_at(place), sharing
        self._sites, self._run_config = 0, dict[str, Value]()
        self._together: SitesTogether | None = None

    def begin(self, sites: int, run_config: dict[str, Value]) -> None:
        """Take the run's settings and its number of sites."""
        self._sites, self._run_config = sites, run_config
        self._together = self._sharing(self._app)

    def serve(self, parcel: Sequence[Sent], common: Sequence[ArrayRecord], *, several: bool) -> tuple[list[Answer], int]:
        """The sites' answers, in their order, and how many sites are worth one pass; 0: it was not asked.

        Args:
            parcel: orders of one kind.
            common: the arrays that they share.
            several: whether a worker has several of them, sooner or later.
        """
        orders = [order_of(one, common, self._sites, self._run_config) for one in parcel]
        together = self._together if parcel[0].kind == MessageType.TRAIN else None
        if together is None:
            return [answer_of(self._alone(*order), order[1]) for order in orders], 1
        worth = together.company(*orders[0]).sites if several else 0
        replies = together(orders, self._alone)
        return [answer_of(reply, context) for reply, (_, context) in zip(replies, orders, strict=True)], worth

    def _alone(self, message: Message, context: Context) -> Message:
        try:
            return self._app(message, context)
        except Exception:  # not of this package's app, which answers in any case
            log.exception("the site failed")
            return replied(Error(code=APP_ERROR, reason=FAILURE), message)
