"""A site's reply, served a second time from the same releases and other records: it has to be the same to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict

from lalora_flwr.audit.observer import Observer, Watched
from lalora_flwr.wire.orders import ARRAYS, MEMORY
from lalora_flwr.wire.replies import COUNTERS

Work = Callable[[RecordDict, Context], RecordDict]
Serve = Callable[[Message, Context], Message]
KNOWN = {ARRAYS, COUNTERS, MEMORY}  # what a reply may hold


class Replaying:
    """A ClientApp that serves its first messages twice: with the canaries, and with none and the releases of the first time.

    Attributes:
        fault: what is wrong with a reply; empty if nothing was.
        compared: how many replies were compared.
    """

    def __init__(self, app: Serve, again: Callable[[Watched, int], Work], observer: Observer, times: int) -> None:
        """
        Args:
            app: serves with the canaries.
            again: serves with the releases of a site's steps from a number on, without canaries.
            observer: of the sites.
            times: messages that are served twice.
        """
        self._app, self._again, self._observer, self._left = app, again, observer, times
        self.fault, self.compared = "", 0

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type != "train" or not self._left:
            return self._app(message, context)
        self._left -= 1
        content, state = copy.deepcopy(message.content), copy.deepcopy(context.state)
        site = self._observer.sites[int(context.node_config["partition-id"])]
        first = len(site.steps)
        reply = self._app(message, context)
        if reply.has_content():
            before = Context(context.run_id, context.node_id, context.node_config, state, context.run_config)
            try:
                fault = _difference(reply.content, self._again(site, first)(content, before))
            except Exception as wrong:  # as where it takes another number of steps
                fault = f"from the same releases there is no reply without the records: {type(wrong).__name__}"
            self.fault = self.fault or fault
            self.compared += 1
        return reply


def _difference(one: RecordDict, other: RecordDict) -> str:
    """What two replies differ in."""
    if unknown := sorted(set(one) - KNOWN):
        return f"a reply holds {unknown[0]!r}, which no reply of a site has"
    if set(one) != set(other):
        return "a reply's parts follow from the records"
    for name in one:
        mine, theirs = one[name], other[name]
        if isinstance(mine, ArrayRecord) and isinstance(theirs, ArrayRecord):
            for slot in mine:
                if not np.array_equal(mine[slot].numpy(), theirs[slot].numpy(), equal_nan=True):
                    return f"{slot} differs though the releases were the same: it follows from the records in another way"
        elif dict(mine) != dict(theirs):
            return f"{name} differs though the releases were the same"
    return ""
