"""Trainers in threads of the test's own process, honest ones and others, and the way to them."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict

from lalora_flwr.site.resident.frames import Kind, receive, send
from lalora_flwr.site.resident.hand_over import Patience, Resident
from lalora_flwr.site.resident.place import Peer, Place
from lalora_flwr.site.resident.surroundings import Owner, surroundings
from lalora_flwr.site.resident.trainer import Trainer, Work
from lalora_flwr.site.resident.words import Order, Told

SHORT = Patience(start=5.0, greeting=2.0, accepted=2.0, silence=1.0)
OWN = Peer(os.geteuid(), None)  # with its process, the test would be ended for the trainer
Script = Callable[[socket.socket, bytes], None]


def context(**changed: Any) -> Context:
    node_config = {"max-epsilon": 4.0, "device": "cpu", **changed}
    return Context(run_id=1, node_id=7, node_config=node_config, state=RecordDict(), run_config={"model.name": "hf/x"})


def content(value: int = 1) -> RecordDict:
    return RecordDict(
        {"counters": MetricRecord({"steps": value, "epsilon": 0.5}), "words": ConfigRecord({"b": b"\0", "on": True})}
    )


def echo(kind: str, records: RecordDict, held: Context) -> Told:
    """What was sent, with the kind; the state counts the messages."""
    seen = int(held.state["seen"]["count"]) + 1 if "seen" in held.state else 1  # type: ignore[arg-type, call-overload, index]
    held.state["seen"] = MetricRecord({"count": seen})
    return Told(RecordDict({**records, "kind": ConfigRecord({"kind": kind}), "empty": ArrayRecord()}), every=0.0)


class Started:
    """Stands for a trainer's process."""

    def __init__(self, *, dead: bool = False) -> None:
        self._dead = dead

    def poll(self) -> int | None:
        return 1 if self._dead else None

    def kill(self) -> None:
        self._dead = True


class Site:
    """The short processes of one site and its trainers.

    Attributes:
        started: the threads of all trainers.
        cut: how many trainers ended in the middle of their work.
    """

    def __init__(self, home: Path, work: Work = echo, script: Script | None = None, peer: Peer = OWN) -> None:
        """``script``: what is done with a connection in place of an honest trainer's conversation."""
        self.home, self.work, self.script, self.peer = home, work, script, peer
        self.owner = Owner.of(os.getpid())
        self.started: list[threading.Thread] = []
        self.cut = threading.Event()

    @property
    def resident(self) -> Resident:
        def start(words: dict[str, Any]) -> Any:
            ready = threading.Event()
            self.started.append(threading.Thread(target=self._live, args=(words, ready), daemon=True))
            self.started[-1].start()
            ready.wait(5)
            return Started()

        return Resident(self.home, self.owner, start, lambda _: self.peer, SHORT)

    def _live(self, words: dict[str, Any], ready: threading.Event) -> None:
        own = surroundings(words["node_config"], words["model"], Owner(*words["owner"]), Path(words["bundles"]))
        with Place(Path(words["folder"]), words["name"]) as place, place.listen() as listener:
            ready.set()
            if self.script is None:
                trainer = Trainer(own, words["node_config"], self.work, lambda _: OWN, self.cut.set)
                trainer.serve(place, listener, float(words["idle"]))
                return
            while True:
                connection, _ = listener.accept()
                with connection:
                    self.script(connection, own)

    @property
    def folder(self) -> Path:
        return self.home / "lalora" / "resident"

    @property
    def sockets(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.is_socket()]


def greeted(connection: socket.socket, own: bytes) -> Order:
    """Do as an honest trainer does, up to the order."""
    receive(connection, [Kind.HELLO], 5)
    send(connection, Kind.WELCOME, own, 5)
    return Order.of(receive(connection, [Kind.ORDER], 5)[1])


def accepted(connection: socket.socket, own: bytes) -> Order:
    """Do as an honest trainer does, up to the work."""
    order = greeted(connection, own)
    send(connection, Kind.ACCEPTED, order.nonce, 5)
    return order
