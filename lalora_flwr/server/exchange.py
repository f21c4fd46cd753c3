"""One round's messages: what each site is sent, and what it has to send back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from lalora_flwr.adapter.slots import Layout, Mask, corner, digest
from lalora_flwr.methods.merges import length_of
from lalora_flwr.methods.method import Method, served_by
from lalora_flwr.methods.transport import Exchange, Packed
from lalora_flwr.server.longest import Sends, longest_update
from lalora_flwr.server.round_signals import Signals
from lalora_flwr.settings import Settings
from lalora_flwr.wire.orders import ARRAYS, CONFIG, MEMORY, EvaluateOrder, TrainOrder
from lalora_flwr.wire.profile import Profile
from lalora_flwr.wire.public import Public
from lalora_flwr.wire.replies import Counters, read_arrays
from lalora_flwr.wire.tensors import BadReply, num_bytes, to_arrays

log = logging.getLogger("lalora_flwr.server")
LONGEST_REASON = 300  # letters of a site's reason that the server repeats


@dataclass
class RoundReport:
    """What the server knows of one round's exchange; everything in it is public."""

    server_round: int
    served: list[int] = field(default_factory=list)  # sites whose reply was merged
    failed: dict[int, str] = field(default_factory=dict)  # site -> fixed reason
    left: set[int] = field(default_factory=set)  # sites without budget, that are not asked again
    evaluated: dict[int, float] = field(default_factory=dict)  # site -> accuracy on its records (evaluate-sites)
    bytes_up: int = 0
    bytes_down: int = 0
    signals: Signals = field(default_factory=Signals)  # of the updates
    repeats: int = 0  # attempts after the first, of a transport that shows no sum if a site is missing

    def on_sites(self) -> dict[str, float]:
        """Mean accuracy of the sites on their own records, each site alike; nothing unless the run asks for it."""
        found = self.evaluated.values()
        return {"site_accuracy": sum(found) / len(found)} if found else {}


def content_of(reply: Message) -> RecordDict:
    """What a site sent.

    Raises:
        BadReply: with its reason, in one line of bounded length, if it sent an error.
    """
    if reply.has_error():
        raise BadReply(" ".join(str(reply.error.reason).split())[:LONGEST_REASON] or "no reason given")
    return reply.content


@dataclass(frozen=True)
class _View:
    """The round as the sites see it that hold the adapter in one way.

    Attributes:
        held: the slots, of their shapes.
        start: all that the sites start from.
        sent: what travels to them.
        digest: of the start, without what stays at the sites.
        trained: the slots that train in the round.
        up: shapes of the arrays that come back.
    """

    held: Layout
    start: Mapping[str, Tensor]
    sent: ArrayRecord
    digest: str
    trained: Mask
    up: Mapping[str, tuple[int, ...]]


class Conversation:
    """Orders and replies of one round."""

    def __init__(
        self,
        method: Method,
        settings: Settings,
        layout: Layout,
        server_round: int,
        adapter: Mapping[str, Tensor],
        directive: Public,
        words: Public,
        model_digest: str,
    ) -> None:
        """
        Args:
            method: of the run.
            settings: the run's.
            layout: the slots as the server holds them.
            server_round: from 1.
            adapter: the round's start, all slots.
            directive: how the round is steered.
            words: what the transport tells the sites.
            model_digest: of the frozen weights.
        """
        self.directive, self.exchange = directive, Exchange(server_round, words, settings.privacy.clip_norm)
        self._method, self._settings, self._layout = method, settings, layout
        self._adapter, self._model_digest = adapter, model_digest
        self._views: dict[tuple[Layout, Mask, int], _View] = {}

    def _view(self, profile: Profile) -> _View:
        held = self._method.schedule.within(self._method.travel.held(self._layout, profile), self.directive)
        steps = self._settings.train.local_steps
        key = held, self._method.travel.trains(held, profile), self._method.travel.steps(steps, profile)
        if key not in self._views:
            turn = self._method.turn(held, self.exchange.server_round, steps, self.directive, profile)
            start = {name: corner(self._adapter[name], slot) for name, slot in held.items()}
            kept = self._method.travel.kept(held)
            sent = to_arrays({name: start[name] for name in self._method.travel.down(turn)})
            up = {name: held[name].shape for name in self._method.travel.up(turn)}
            self._views[key] = _View(
                held, start, sent, digest({n: v for n, v in start.items() if n not in kept}), turn.trained, up
            )
        return self._views[key]

    def order(
        self, node: int, profile: Profile, counted: tuple[int, int], memory: ArrayRecord | None, own: str = ""
    ) -> tuple[Message, int]:
        """The training message of a site, and the bytes of the adapter in it.

        Args:
            node, profile: of the site.
            counted: its steps so far, and how many of them were for a ridge head.
            memory: a virtual site's; None: it has none.
            own: digest of its last reply that was merged, where slots stay at the sites.
        """
        view, now = self._view(profile), self.exchange
        order = TrainOrder(now.server_round, view.digest, self._model_digest, *counted, self.directive, now.words, own)
        content = RecordDict({ARRAYS: view.sent, CONFIG: order.to_record()})
        if memory is not None:
            content[MEMORY] = memory
        return Message(content, dst_node_id=node, message_type=MessageType.TRAIN), num_bytes(view.sent)

    def read(self, content: RecordDict, profile: Profile, *, memory: bool) -> Packed:
        """The arrays of a reply, if they are what the site had to send.

        Raises:
            BadReply: naming what is wrong.
        """
        view, transport = self._view(profile), self._method.transport
        packed = read_arrays(content, view.up, transport.dtype, transport.check, memory=memory)
        if transport.hides_updates:
            return packed
        if self._method.server_steps:
            if self._settings.private:
                self._check_noise(packed)
        else:
            self._check_moves(view, packed)
        return packed

    def too_long(self, packed: Packed, profile: Profile, counters: Counters) -> str:
        """How an update is longer than any honest one; empty if it is not, or if the transport hides it.

        Args:
            packed: what `read` gave.
            profile: of the site.
            counters: of its reply, checked.
        """
        if self._method.transport.hides_updates:
            return ""
        view, start, method, settings = self._view(profile), self.sent(profile), self._method, self._settings
        masks = method.masks(view.held, self.exchange.server_round, settings.train.local_steps, self.directive, profile)
        own = frozenset(packed)
        sends = Sends(self._layout, view.held, [mask & own for mask in masks], length_of({n: start[n] for n in own}))
        most = longest_update(served_by(settings, profile), method, sends, counters)
        length = length_of({name: np.asarray(value, np.float64) - start[name] for name, value in packed.items()})
        if length <= most:
            return ""
        return f"its update is {length:.4g} long, above {most:.4g}, which clip, noise, rate and steps allow"

    def _check_noise(self, packed: Packed) -> None:
        """
        Raises:
            BadReply: a gradient that should have noise is zero everywhere.
        """
        if still := [name for name, value in packed.items() if not value.any()]:
            raise BadReply(f"the gradient of {min(still)} is zero, so that it has no noise")

    def sent(self, profile: Profile) -> Mapping[str, NDArray[np.float32]]:
        """What a site of this profile sends if it moves nothing: its start, or where the server steps gradients of zero."""
        start = {name: value.numpy() for name, value in self._view(profile).start.items()}
        return {name: np.zeros_like(value) for name, value in start.items()} if self._method.server_steps else start

    def _check_moves(self, view: _View, packed: Packed) -> None:
        """Did the adapter move, and only where it should have? Losses can fall while saved factors never change.

        Raises:
            BadReply: a slot that was frozen in the round moved, or one that got noise did not.
        """
        for name, value in packed.items():
            moved = not np.array_equal(value, view.start[name].numpy())
            if moved and name not in view.trained:
                raise BadReply(f"{name} moved in a round in which it is frozen")
            if not moved and name in view.trained and self._settings.private:
                raise BadReply(f"{name} did not move in a round in which it is trained")


def evaluation(
    method: Method,
    layout: Layout,
    adapter: Mapping[str, Tensor],
    order: EvaluateOrder,
    node: int,
    profile: Profile,
    memory: ArrayRecord | None,
) -> tuple[Message, int]:
    """The evaluation message of a site, and the bytes of the adapter in it; ``memory`` as in training."""
    held = method.travel.held(layout, profile)
    sent = to_arrays({name: corner(adapter[name], held[name]) for name in method.travel.down(method.at_rest(held))})
    content = RecordDict({ARRAYS: sent, CONFIG: order.to_record()})
    if memory is not None:
        content[MEMORY] = memory
    return Message(content, dst_node_id=node, message_type=MessageType.EVALUATE), num_bytes(sent)
