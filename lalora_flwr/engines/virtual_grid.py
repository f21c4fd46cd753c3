"""Flower's `Grid` over virtual sites of this package's own: no SuperLink, and nothing that is looked for every so often."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterable, Sequence

from flwr.app import Context, Message, Metadata, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from lalora_flwr.engines.together import Order
from lalora_flwr.settings import Value
from lalora_flwr.wire.replies import IDENTITY_QUERY

RUN = 1
FIRST_NODE = 100  # node ids are not partition ids, as in a real federation


def stamp_messages() -> None:
    """Flower stamps each message with what its process knows of the run."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, 1, 1


def context_of(site: int, sites: int, run_config: dict[str, Value], state: RecordDict) -> Context:
    """A virtual site's, as Flower makes it."""
    node_config: dict[str, Value] = {"partition-id": site, "num-partitions": sites}
    return Context(RUN, FIRST_NODE + site, node_config, state, dict(run_config))


class VirtualGrid(Grid):
    """Each site keeps its own context, as in Flower, from its first order on: one that has none costs nothing."""

    def __init__(self, num_supernodes: int, run_config: dict[str, Value]) -> None:
        stamp_messages()
        self._numbers = itertools.count(1)
        self._replies: dict[str, Message] = {}
        self._nodes, self._run_config = range(FIRST_NODE, FIRST_NODE + num_supernodes), run_config
        self._contexts: dict[int, Context] = {}

    @abstractmethod
    def serve(self, orders: Sequence[Order], timeout: float | None) -> list[Message]:
        """The sites' replies, in any order.

        Args:
            orders: of one kind, each with its site's context, which changes as the site serves it.
            timeout: seconds after which replies that are not there are not waited for.
        """

    def set_run(self, run: Run) -> None:
        pass

    @property
    def run(self) -> Run:
        raise NotImplementedError("this engine has no SuperLink and so no Flower run")

    def create_message(self, *_: object, **__: object) -> Message:
        raise NotImplementedError("Flower's old way to make a message; this package builds `Message` itself")

    def get_node_ids(self) -> list[int]:
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return self._pushed(messages, None)

    def _pushed(self, messages: Iterable[Message], timeout: float | None) -> list[str]:
        named = {f"message-{next(self._numbers)}": message for message in messages}
        for name, message in named.items():
            message.metadata.__dict__["_message_id"] = name  # Flower's grids do the same
        if named:
            replies = self.serve([(message, self._context(message.metadata)) for message in named.values()], timeout)
            self._replies |= {reply.metadata.reply_to_message_id: reply for reply in replies}
        return list(named)

    def _context(self, of: Metadata) -> Context:
        if of.dst_node_id in self._contexts:
            return self._contexts[of.dst_node_id]
        made = context_of(self._nodes.index(of.dst_node_id), len(self._nodes), self._run_config, RecordDict())
        if of.message_type != IDENTITY_QUERY:  # which leaves no state
            self._contexts[of.dst_node_id] = made
        return made

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self._pushed(messages, timeout))
