"""Waiting for the replies of real sites, which die, restart and go out of reach while they work.

Flower's own wait has two gaps. An error that the SuperLink makes up for a dead site names the SuperLink as its sender. And
if a dead site is back before the server looks again, the SuperLink takes it for alive and the server waits for a reply
that will never come, until the message expires after 12 hours.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, Error, Message
from flwr.serverapp import Grid

from lalora_flwr.ground.pauses import pause
from lalora_flwr.wire.packed import BadPack, packed, unpacked
from lalora_flwr.wire.pulling import pull_soon

NO_REPLY = 5  # Flower's code for a node that cannot be reached
UNREADABLE = 2  # and for a site whose app failed
HTTP_GRID = "HttpGrid"  # by name: its module imports a database for a second, and is there where such a grid is
RESTARTED = "the site was restarted, or out of reach, in the middle of the round"


class WatchedGrid:
    """A grid of real sites that answers each message: with the site's reply, or with an error that names the site.

    The arrays of a message travel as one (`lalora_flwr.wire.packed`).
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def _activations(self) -> dict[int, str]:
        """When each connected site was last connected anew."""
        return {node.node_id: node.last_activated_at for node in self._grid.get_nodes()}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """As Flower's, but a site that was connected anew since it was asked is not waited for: it knows of no message."""
        messages = list(messages)
        made: dict[int, ArrayRecord] = {}
        for message in messages:
            if message.has_content():
                message.content = packed(message.content, made)
        asked_at = self._activations()
        waiting = dict(zip(self._grid.push_messages(messages), messages, strict=False))
        replies: list[Message] = []
        begun = time.monotonic()  # Flower's own looks each three seconds, which a short round would mostly wait for
        end = float("inf") if timeout is None else begun + timeout
        while waiting and time.monotonic() < end:
            now_at = self._activations()  # before the replies: what a site sent before it was restarted counts
            for reply in self._grid.pull_messages(list(waiting)):
                order = waiting.pop(reply.metadata.reply_to_message_id)
                from_site = reply.metadata.src_node_id == order.metadata.dst_node_id
                replies.append(_unpacked(reply, order) if from_site else Message(reply.error, reply_to=order))
            for number, order in list(waiting.items()):
                node = order.metadata.dst_node_id
                if node in asked_at and node in now_at and asked_at[node] != now_at[node]:
                    del waiting[number]
                    replies.append(Message(Error(code=NO_REPLY, reason=RESTARTED), reply_to=order))
            if waiting:
                time.sleep(pause(time.monotonic() - begun))
        return replies


def _unpacked(reply: Message, order: Message) -> Message:
    if reply.has_error():
        return reply
    try:
        reply.content = unpacked(reply.content)
    except BadPack as fault:
        return Message(Error(code=UNREADABLE, reason=str(fault)), reply_to=order)
    return reply


def watched(grid: Grid) -> Grid:
    """The grid itself, or if it reaches real sites, a `WatchedGrid` around it."""
    if not any(kind.__name__ == HTTP_GRID for kind in type(grid).__mro__):
        return grid
    pull_soon()
    return WatchedGrid(grid)  # type: ignore[return-value]
