"""Flower's `Grid` over Ray's workers: a round's orders go out in parcels, and answers come back as they are ready."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from flwr.app import ArrayRecord, Error, Message, MessageType
from flwr.clientapp import ClientApp

from lalora_flwr.engines.parcels import Answer, Sent, common_arrays, replied, reply_of, sent
from lalora_flwr.engines.together import Order, even
from lalora_flwr.engines.virtual_grid import VirtualGrid
from lalora_flwr.settings import Value
from lalora_flwr.site.app import APP_ERROR

SERVED_BY_WORKERS = (MessageType.TRAIN, MessageType.EVALUATE)


class Workers(Protocol):
    """As `lalora_flwr.engines.ray_workers.RayWorkers`."""

    @property
    def alive(self) -> int: ...
    @property
    def idle(self) -> int: ...
    def shared(self, common: Sequence[ArrayRecord]) -> object: ...
    def give(self, parcel: Sequence[Sent], common: object, *, several: bool) -> Any: ...
    def done(self, timeout: float) -> Iterable[tuple[Any, tuple[list[Answer], int] | Exception]]: ...


class RayGrid(VirtualGrid):
    """A round's sites are spread evenly over the workers, and those of a worker share passes where that pays.

    Where sites go alone each is a parcel of its own, so that a worker which is done early takes the next.
    """

    def __init__(
        self,
        app: ClientApp,
        num_supernodes: int,
        run_config: dict[str, Value],
        workers: Workers,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            app: of the sites; says here who each one is.
            num_supernodes, run_config: of the run.
            workers: serve all other orders.
            clock: seconds.
        """
        super().__init__(num_supernodes, run_config)
        self._app, self._workers, self._clock = app, workers, clock
        self._worth = 0  # sites in a pass, as workers say; 0: none has said it yet
        self._given: dict[Any, Sequence[Order]] = {}  # a straggler's may be of an earlier round

    def serve(self, orders: Sequence[Order], timeout: float | None) -> list[Message]:
        kind = orders[0][0].metadata.message_type
        if kind not in SERVED_BY_WORKERS:
            return [self._app(message, context) for message, context in orders]
        end = math.inf if timeout is None else self._clock() + timeout
        common = common_arrays(orders)
        shared, several = self._workers.shared(common), len(orders) > self._workers.alive
        waiting, ours, replies = deque(self._parts(orders, kind)), set[Any](), list[Message]()
        while waiting or ours:
            while waiting and self._workers.idle:
                part = waiting.popleft()
                ticket = self._workers.give([sent(order, common) for order in part], shared, several=several)
                self._given[ticket] = part
                ours.add(ticket)
            if not self._given:
                return replies + [_failed("ActorDiedError: no worker is left", order) for part in waiting for order in part]
            if (left := end - self._clock()) <= 0:
                break
            for ticket, found in self._workers.done(left):
                read = self._read(self._given.pop(ticket), found)
                replies += read if ticket in ours else []
                ours.discard(ticket)
        return replies

    def _parts(self, orders: Sequence[Order], kind: str) -> list[Sequence[Order]]:
        workers = max(1, self._workers.alive)
        if kind != MessageType.TRAIN or self._worth == 1:
            return even(orders, len(orders))
        least = math.ceil(len(orders) / self._worth) if self._worth else 1
        return even(orders, min(len(orders), math.ceil(least / workers) * workers))

    def _read(self, part: Sequence[Order], found: tuple[list[Answer], int] | Exception) -> list[Message]:
        if isinstance(found, Exception):
            return [_failed(f"{type(found).__name__}: {found}", order) for order in part]
        answers, worth = found
        self._worth = max(self._worth, worth)
        return [reply_of(answer, order) for answer, order in zip(answers, part, strict=True)]


def _failed(reason: str, order: Order) -> Message:
    return replied(Error(code=APP_ERROR, reason=reason), order[0])
