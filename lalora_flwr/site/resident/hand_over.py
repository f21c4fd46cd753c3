"""The short process's side: give a message to the site's resident trainer, start one if need be, and take the answer.

Guarantee: until the trainer has accepted a message nothing of it was begun, and the short process may serve it itself. From then
on it is never served a second time: if the trainer dies, falls silent or breaks the protocol, it is killed and the answer is the
fixed failure, while what it reserved in the ledger stays counted. The answer to another message is never taken for this one's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from flwr.app import Context, RecordDict

from lalora_flwr.ledger.node_values import RESIDENT_SECONDS, seconds
from lalora_flwr.site.resident.frames import NONCE, BadFrame, Kind, receive, send
from lalora_flwr.site.resident.place import Grip, NoPlace, Peer, Place, is_own, peer_of
from lalora_flwr.site.resident.surroundings import NodeConfig, Owner, surroundings
from lalora_flwr.site.resident.words import FAILURE, Order, Told, answer_of

log = logging.getLogger("lalora_flwr.site")
BOOT = Path(__file__).with_name("boot.py")
COMMAND = "flwr-clientapp"  # Flower's process for one message of a real site


@dataclass(frozen=True)
class Patience:
    """Seconds to wait: for a new trainer to listen, an idle one to greet and to accept, a working one to give a sign of life."""

    start: float = 60.0
    greeting: float = 10.0
    accepted: float = 120.0
    silence: float = 120.0


def start(words: dict[str, object]) -> subprocess.Popen[bytes]:
    """A trainer's process: it leaves this one's session, and shares its environment, folder and log."""
    command = [sys.executable, "-P", str(BOOT)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps({**words, "path": sys.path}).encode())
    process.stdin.close()
    return process


def resident_seconds(node_config: NodeConfig) -> float:
    """After how many idle seconds the site's trainer ends; 0: it has none."""
    try:
        return float(seconds(node_config.get("resident-seconds", RESIDENT_SECONDS)))
    except ValueError:
        return 0.0  # the owner is told when the message is served


def serves_one_message(arguments: Sequence[str]) -> bool:
    """Whether Flower made this process for one message of a real site. ``arguments``: the process's own."""
    return bool(arguments) and Path(arguments[0]).name == COMMAND and hasattr(socket, "AF_UNIX") and os.getppid() > 1


@dataclass(frozen=True)
class Resident:
    """The way to the trainer of a site.

    Attributes:
        home: Flower's folder, FLWR_HOME.
        owner: the process with whose end the trainer's ends.
        start: starts a trainer.
        peer: who is at the other end.
        patience: how long to wait.
    """

    home: Path
    owner: Owner
    start: Callable[[dict[str, object]], subprocess.Popen[bytes]] = start
    peer: Callable[[socket.socket], Peer] = peer_of
    patience: Patience = field(default_factory=Patience)

    def __call__(self, kind: str, content: RecordDict, context: Context) -> Told | None:
        """What the trainer says to a message; ``context.state`` then is what it has to be after it.

        Returns:
            None if no trainer took the message: nothing was begun.
        """
        if not (idle := resident_seconds(context.node_config)):
            return None
        order = Order(os.urandom(NONCE), kind, content, context)
        with ExitStack() as stack:
            try:
                payload = order.to_bytes()
                place = stack.enter_context(self._place(context))
                if not place.take():
                    log.info("resident trainer: it serves another message; this one is served without it")
                    return None
                line = stack.enter_context(self._line(place, context, idle))
                self._give(line, order, payload)
            except (NoPlace, BadFrame, OSError, ValueError) as fault:
                log.warning("resident trainer: %s; this message is served without it", fault)
                return None
            told, context.state = self._taken(line, order)  # from here on it is the trainer's
        return told

    def _place(self, context: Context) -> Place:
        site = json.dumps([context.node_id, dict(context.node_config)], sort_keys=True)
        return Place(self.home / "lalora" / "resident", hashlib.sha256(site.encode()).hexdigest()[:16])

    def _line(self, place: Place, context: Context, idle: float) -> Line:
        """A connection to a trainer of these surroundings.

        Raises:
            BadFrame, NoPlace: there is none, and none can be started.
        """
        model = str(context.run_config.get("model.name", "")).partition("/")[2]
        bundles = self.home / "apps"
        wanted = surroundings(context.node_config, model, self.owner, bundles)
        if line := self._connected(place):
            if reason := self._strange(line, wanted):
                line.kill()
                log.info("resident trainer: the one that was there is ended: %s", reason)
            else:
                return line
        place.clear()
        process = self.start(
            {
                "folder": str(place.folder),
                "name": place.name,
                "node_config": dict(context.node_config),
                "model": model,
                "owner": [self.owner.process, self.owner.started],
                "bundles": str(bundles),
                "idle": idle,
            }
        )
        end = time.monotonic() + self.patience.start
        while not (line := self._connected(place)):
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                raise BadFrame("it could not be started")
            time.sleep(0.01)
        if reason := self._strange(line, wanted):
            line.kill()
            raise BadFrame(f"a new one is of no use: {reason}")
        return line

    def _connected(self, place: Place) -> Line | None:
        connection = place.connect(self.patience.greeting)
        return Line(connection, self.peer(connection)) if connection else None

    def _strange(self, line: Line, wanted: bytes) -> str:
        """Why this trainer must not get the message; nothing if it may."""
        if not is_own(line.peer):
            return "it belongs to another user"
        try:
            send(line.connection, Kind.HELLO, wanted, self.patience.greeting)
            _, found = receive(line.connection, [Kind.WELCOME], self.patience.greeting)
        except BadFrame as fault:
            return str(fault)
        return "" if found == wanted else "its code, node-config, environment, packages, model or SuperNode is another one"

    def _give(self, line: Line, order: Order, payload: bytes) -> None:
        """
        Raises:
            BadFrame: the trainer did not accept the message, and is ended.
        """
        try:
            send(line.connection, Kind.ORDER, payload, self.patience.accepted)
            _, nonce = receive(line.connection, [Kind.ACCEPTED], self.patience.accepted)
            if nonce != order.nonce:
                raise BadFrame("it accepted another message")
        except BadFrame:
            line.kill()
            raise

    def _taken(self, line: Line, order: Order) -> tuple[Told, RecordDict]:
        """The answer, or the fixed failure with the state as it was."""
        try:
            while True:
                kind, payload = receive(line.connection, [Kind.WORKING, Kind.ANSWER], self.patience.silence, again=1)
                if kind == Kind.ANSWER:
                    return answer_of(payload, order.nonce)
        except BadFrame as fault:
            line.kill()
            log.error("resident trainer: it took the message and did not answer: %s; the message failed", fault)
            return Told(None, FAILURE), order.context.state


class Line:
    """A connection to a trainer, and a hold on its process."""

    def __init__(self, connection: socket.socket, peer: Peer) -> None:
        self.connection, self.peer = connection, peer
        self._grip = Grip(peer.process) if peer.process and is_own(peer) else None

    def __enter__(self) -> Line:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def kill(self) -> None:
        """End the trainer, as far as the system tells which process it is."""
        if self._grip:
            self._grip.kill()
        self.close()

    def close(self) -> None:
        if self._grip:
            self._grip.release()
            self._grip = None
        self.connection.close()


def resident_of_this_process() -> Resident:
    """The way to the trainer for a process that Flower made."""
    from flwr.supercore.utils import get_flwr_home

    return Resident(get_flwr_home().absolute(), Owner.of(os.getppid()))
