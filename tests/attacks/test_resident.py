"""Attacks on a site's resident trainer and on those who call it."""

from __future__ import annotations

import os
import pickle
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lalora_flwr.site.resident.frames import NONCE, BadFrame, Kind, pack, receive, send
from lalora_flwr.site.resident.place import Peer, Place
from lalora_flwr.site.resident.surroundings import Owner, code_digest, surroundings
from lalora_flwr.site.resident.trainer import Trainer
from lalora_flwr.site.resident.words import FAILURE, Order, Told, answer_to_bytes
from tests.site.resident.trainers import OWN, Site, accepted, content, context, echo

OWN_DIGEST = b"d" * 32
STRANGER = Peer(os.geteuid() + 1, None)


class Attacked:
    """A trainer of which every message is counted, and its peer's end."""

    def __init__(self, peer: Peer = OWN) -> None:
        self.served = 0

        def work(kind: str, records: Any, held: Any) -> Told:
            self.served += 1
            return echo(kind, records, held)

        self.trainer = Trainer(OWN_DIGEST, dict(context().node_config), work, lambda _: peer, lambda: None)

    def converse(self, *sent: bytes) -> tuple[bool, bytes]:
        """Send it bytes and hang up; whether it goes on, and all that it said."""
        own, its = socket.socketpair()
        with own:
            for text in sent:
                own.sendall(text)
            own.shutdown(socket.SHUT_WR)
            with its:
                goes_on = self.trainer.converse(its)
            said = b""
            for _ in range(2):  # first the news that not all was read, if so, then what it said
                with suppress(ConnectionResetError):
                    while chunk := own.recv(2**16):
                        said += chunk
        return goes_on, said


def frame(kind: int, payload: bytes, length: int | None = None) -> bytes:
    return struct.pack(">BQ", kind, len(payload) if length is None else length) + payload


HELLO = frame(Kind.HELLO, OWN_DIGEST)
ORDER = Order(b"n" * NONCE, "train", content(), context()).to_bytes()
ELSEWHERE = Order(b"n" * NONCE, "train", content(), context(**{"max-epsilon": 1000.0})).to_bytes()


def test_another_user_is_not_heard() -> None:
    attacked = Attacked(STRANGER)
    assert attacked.converse(HELLO, frame(Kind.ORDER, ORDER)) == (True, b"") and not attacked.served


def test_a_trainer_of_another_user_gets_no_message(tmp_path: Path) -> None:
    heard: list[bytes] = []
    site = Site(tmp_path, script=lambda connection, _: heard.append(connection.recv(100)), peer=STRANGER)
    assert site.resident("train", content(), context()) is None
    site.resident("train", content(), context())
    assert not any(heard)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        frame(Kind.HELLO, OWN_DIGEST * 9),
        frame(Kind.ORDER, ORDER),
        HELLO + frame(Kind.ORDER, ORDER[:-1], len(ORDER)),
        HELLO + frame(Kind.ORDER, ORDER + b"x"),
        HELLO + frame(Kind.ORDER, b"", 2**60),
        HELLO + frame(Kind.ORDER, ORDER[:40]),
        HELLO + frame(Kind.ORDER, pickle.dumps({"run": "me"})),
        HELLO + frame(Kind.ORDER, pack(b"n" * NONCE, b"train", pickle.dumps(1), pickle.dumps(2))),
        HELLO + frame(Kind.ORDER, pack(b"short", b"train", b"", b"")),
        HELLO + frame(Kind.ANSWER, ORDER),
        HELLO + HELLO,
        HELLO + frame(Kind.ORDER, ELSEWHERE),
    ],
    ids=lambda sent: f"{len(sent)}-bytes",
)
def test_nothing_but_a_whole_order_under_the_owners_node_config_is_begun(sent: bytes) -> None:
    attacked = Attacked()
    goes_on, said = attacked.converse(sent)
    assert goes_on and not attacked.served and frame(Kind.ACCEPTED, b"n" * NONCE) not in said
    attacked.converse(HELLO, frame(Kind.ORDER, ORDER))
    assert attacked.served == 1  # honest peers are served as before


def test_a_trainer_begins_nothing_for_other_surroundings_and_ends() -> None:
    attacked = Attacked()
    goes_on, said = attacked.converse(frame(Kind.HELLO, b"e" * 32), frame(Kind.ORDER, ORDER))
    assert not goes_on and not attacked.served and said == frame(Kind.WELCOME, OWN_DIGEST)


def test_an_answer_is_good_for_one_message(tmp_path: Path) -> None:
    """A false trainer repeats its first answer; the second message fails, and takes neither answer nor state."""
    kept: list[bytes] = []

    def replays(connection: socket.socket, own: bytes) -> None:
        order = accepted(connection, own)
        kept.append(answer_to_bytes(order.nonce, Told(content(1), every=0.0), content(9)))
        send(connection, Kind.ANSWER, kept[0], 5)

    site, held = Site(tmp_path, script=replays), context()
    first = site.resident("train", content(), held)
    assert first and first.content == content(1) and held.state == content(9)
    held = context()
    assert site.resident("train", content(), held) == Told(None, FAILURE) and not held.state


def test_an_answer_before_it_is_due_or_under_another_name_is_not_taken(tmp_path: Path) -> None:
    def hasty(connection: socket.socket, own: bytes) -> None:
        receive(connection, [Kind.HELLO], 5)
        with suppress(BadFrame):
            send(connection, Kind.ANSWER, answer_to_bytes(b"n" * NONCE, Told(content()), content()), 5)

    assert Site(tmp_path / "a", script=hasty).resident("train", content(), context()) is None
    with pytest.raises(BadFrame):
        Order.of(answer_to_bytes(b"n" * NONCE, Told(content()), content()))


def loose(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o755)


def link(folder: Path) -> None:
    elsewhere = folder.parents[2] / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.parent.mkdir(parents=True)
    folder.symlink_to(elsewhere)


def file(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("")


@pytest.mark.parametrize("made", [loose, link, file], ids=lambda f: f.__name__)
def test_no_folder_is_used_that_others_may_have_prepared(made: Callable[[Path], None], tmp_path: Path) -> None:
    site = Site(tmp_path / "home")
    made(site.folder)
    assert site.resident("train", content(), context()) is None and not site.started


def test_what_lies_under_the_sockets_name_is_not_followed(tmp_path: Path) -> None:
    """A file and a link in the socket's place are taken away, and what the link leads to stays."""
    site, held = Site(tmp_path), context()
    with site.resident._place(held) as place:
        (tmp_path / "victim").write_text("kept")
        (site.folder / place.name).symlink_to(tmp_path / "victim")
        assert place.mark() != (tmp_path / "victim").stat().st_ino
    assert site.resident("train", content(), held)
    assert (tmp_path / "victim").read_text() == "kept" and len(site.sockets) == 1


def bundle(folder: Path, **files: str) -> Path:
    for name, text in {"lalora_flwr/client_app.py": "1", **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_any_changed_file_of_a_bundle_and_any_other_place_is_other_code(tmp_path: Path) -> None:
    apps = tmp_path / "apps"
    same = bundle(apps / "one")
    before = code_digest(same, apps)
    assert before == code_digest(same, apps)
    assert before != code_digest(bundle(apps / "two"), apps)
    bundle(same, **{"lalora_flwr/__pycache__/client_app.pyc": "made by Python"})
    assert before == code_digest(same, apps)
    for name in ("torch.py", "lalora_flwr/site/round.py", "data.bin"):
        bundle(same, **{name: "x"})
        assert code_digest(same, apps) != before
        before = code_digest(same, apps)
    bundle(same, **{"lalora_flwr/client_app.py": "2"})
    assert code_digest(same, apps) != before


def test_all_that_decides_about_a_message_is_in_the_surroundings(tmp_path: Path) -> None:
    apps, here = tmp_path / "apps", Owner(1, "2")
    root = bundle(apps / "one")
    given: dict[str, Any] = {"root": root, "environment": {"A": "1"}, "path": [str(root)]}

    def digest(node_config: dict[str, Any] | None = None, owner: Owner = here, **changed: Any) -> bytes:
        return surroundings({"a": 1} if node_config is None else node_config, "", owner, apps, **{**given, **changed})

    assert digest() == digest()
    others = [
        *(digest(node_config) for node_config in ({"a": True}, {"a": 1.0}, {"a": "1"}, {"a": 1, "b": 2}, {})),
        digest(owner=Owner(1, "3")),
        digest(owner=Owner(2, "2")),
        digest(environment={"A": "2"}),
        digest(environment={"A": "1", "B": ""}),
        digest(path=["/elsewhere", str(root)]),
        digest(root=bundle(apps / "two")),
    ]
    assert len({digest(), *others}) == 1 + len(others)


def test_the_folder_of_a_run_is_not_searched(tmp_path: Path) -> None:
    """A run may name any folder as its model's; only a model's own folder is looked into, and not below it."""
    from lalora_flwr.site.resident.surroundings import model_stamp

    assert model_stamp({}, "/") == model_stamp({}, "") == model_stamp({}, "org/name") == model_stamp({}, "a\0b") == ()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_text("")
    (tmp_path / "config.json").write_text("")
    assert [Path(mark[0]).name for mark in model_stamp({}, str(tmp_path))] == ["config.json", "deep"]
    assert len(model_stamp({"model-path": str(tmp_path)}, "/")) == 2


def test_a_place_is_usable_by_its_owner_alone(tmp_path: Path) -> None:
    with Place(tmp_path / "own", "site") as place, place.listen():
        assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "own" / "site").stat().st_mode & 0o777 == 0o600
