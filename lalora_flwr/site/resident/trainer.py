"""The resident trainer: serves one message after the other, and ends where going on might change an answer.

It ends when its SuperNode's helper process ends, after an idle time, when the process that waits for its answer is gone (at
once, as that process would have), after every answer that is an error, and when another trainer has taken its place.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Context, RecordDict

from lalora_flwr.site.resident.frames import BadFrame, Kind, receive, send
from lalora_flwr.site.resident.place import Peer, Place, is_own, peer_of
from lalora_flwr.site.resident.surroundings import NodeConfig
from lalora_flwr.site.resident.words import Order, Told, answer_to_bytes

log = logging.getLogger("lalora_flwr.site")
GREETING = 10.0  # seconds for a peer to say what it wants
TRANSFER = 120.0  # seconds for a frame to travel
WORKING = 10.0  # seconds between two signs of life
LOOK = 0.5  # seconds between two looks at the socket's name

Work = Callable[[str, RecordDict, Context], Told]


def end_now() -> None:
    """Without a word to anybody, as kill -9: the ledger is made for it."""
    os._exit(1)


@dataclass(frozen=True)
class Trainer:
    """
    Attributes:
        surroundings: that it was started in.
        node_config: its owner's; a message under another one is not begun.
        work: what it does with a message; it has to answer every one, and with fixed reasons only.
        peer: who is at the other end.
        end: ends the process in the middle of its work.
    """

    surroundings: bytes
    node_config: NodeConfig
    work: Work
    peer: Callable[[socket.socket], Peer] = peer_of
    end: Callable[[], None] = end_now

    def serve(self, place: Place, listener: socket.socket, idle: float) -> None:
        """Serve messages, one at a time, until there is a reason to end."""
        mark, since = place.mark(), time.monotonic()
        listener.settimeout(min(LOOK, idle))
        while time.monotonic() - since < idle and place.mark() == mark:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:
                if not self.converse(connection):
                    break
            since = time.monotonic()
        if place.mark() == mark:
            place.clear()

    def converse(self, connection: socket.socket) -> bool:
        """One message. Whether the trainer may serve another."""
        if not is_own(self.peer(connection)):
            log.error("the resident trainer was called by another user, who was not heard")
            return True
        try:
            _, wanted = receive(connection, [Kind.HELLO], GREETING)
            send(connection, Kind.WELCOME, self.surroundings, GREETING)
            if wanted != self.surroundings:
                return False  # what it was started in is no more
            _, payload = receive(connection, [Kind.ORDER], TRANSFER)
            order = Order.of(payload)
            if dict(order.context.node_config) != dict(self.node_config):
                raise BadFrame("its node-config is another site's")
            send(connection, Kind.ACCEPTED, order.nonce, GREETING)
        except BadFrame as fault:
            log.warning("the resident trainer got no whole message: %s", fault)
            return True  # nothing was begun
        return self._answer(connection, order)

    def _answer(self, connection: socket.socket, order: Order) -> bool:
        company = Company(connection, self.end)
        told = self.work(order.kind, order.content, order.context)
        try:
            payload = answer_to_bytes(order.nonce, told, order.context.state)
            company.over()
            send(connection, Kind.ANSWER, payload, TRANSFER)
        except (BadFrame, ValueError) as fault:
            log.error("the resident trainer could not give its answer: %s", fault)
            return False
        finally:
            company.over()
        return told.content is not None


class Company:
    """Stays with a connection while the work is done: tells the peer that it goes on, and ends it if the peer is gone."""

    def __init__(self, connection: socket.socket, end: Callable[[], None]) -> None:
        self._connection, self._end = connection, end
        self._lock, self._over = threading.Lock(), False
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._stay, name="company", daemon=True)
        self._thread.start()

    def over(self) -> None:
        """The work is done. From here on nothing is sent or ended."""
        if self._over:
            return
        with self._lock:
            self._over = True
        self._wake.close()
        self._thread.join()
        self._woken.close()

    def _stay(self) -> None:
        poll = select.poll()
        poll.register(self._connection, select.POLLIN | select.POLLHUP | select.POLLERR)
        poll.register(self._woken, select.POLLIN | select.POLLHUP)
        while True:
            ready = poll.poll(WORKING * 1000)
            with self._lock:
                if self._over:
                    return
                gone = bool(ready)
                try:
                    if not gone:
                        send(self._connection, Kind.WORKING, b"", GREETING)
                except BadFrame:
                    gone = True
                if gone:
                    log.warning("the process that the resident trainer works for is gone; the trainer ends with it")
                    self._end()
                    return
