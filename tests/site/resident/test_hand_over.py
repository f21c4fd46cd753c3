"""A message through the resident trainer: what the reply says, and what happens when the trainer does not play along."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from lalora_flwr.site.app import answer
from lalora_flwr.site.resident import hand_over
from lalora_flwr.site.resident.frames import Kind, send
from lalora_flwr.site.resident.place import Place
from lalora_flwr.site.resident.surroundings import Owner
from lalora_flwr.site.resident.words import FAILURE, Told
from tests.deployment.processes import wait_for
from tests.site.resident.trainers import Site, Started, accepted, content, context, echo, greeted


def test_one_trainer_serves_message_after_message_and_the_state_comes_back(tmp_path: Path) -> None:
    site, held = Site(tmp_path), context()
    for number in (1, 2, 3):
        told = site.resident("train", content(number), held)
        assert told and told.content and told.every == 0.0
        assert told.content["counters"] == content(number)["counters"] and told.content["kind"]["kind"] == "train"
        assert held.state["seen"]["count"] == number
    assert len(site.started) == 1
    (socket,) = site.sockets
    assert socket.stat().st_mode & 0o777 == 0o600 and site.folder.stat().st_mode & 0o777 == 0o700


def test_a_trainer_ends_after_an_error_so_that_nothing_of_it_stays(tmp_path: Path) -> None:
    site = Site(tmp_path, lambda *_: Told(None, "budget: spent", 5.0))
    for number in (1, 2):
        assert site.resident("evaluate", content(), context()) == Told(None, "budget: spent", 5.0)
        assert len(site.started) == number
        site.started[-1].join(5)
        assert not site.sockets


@pytest.mark.parametrize("change", ["environment", "SuperNode", "model"])
def test_a_trainer_of_other_surroundings_is_replaced(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("1")
    site, held = Site(tmp_path), context()
    held.run_config["model.name"] = f"hf/{model}"
    assert site.resident("train", content(), held)
    if change == "environment":
        monkeypatch.setenv("LALORA_TEST", "other")
    elif change == "model":
        (model / "config.json").write_text("2")
    else:
        site.owner = Owner(1, "0")
    assert site.resident("train", content(), held)
    assert len(site.started) == 2
    site.started[0].join(5)
    assert not site.started[0].is_alive() and site.started[1].is_alive()


def test_sites_with_other_node_configs_share_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path)
    assert site.resident("train", content(), context()) and site.resident("train", content(), context(device="cuda"))
    assert len(site.started) == len(site.sockets) == 2


def test_it_ends_when_it_is_idle(tmp_path: Path) -> None:
    site = Site(tmp_path)
    assert site.resident("train", content(), context(**{"resident-seconds": 0.2}))
    site.started[0].join(5)
    assert not site.started[0].is_alive() and not site.sockets


@pytest.mark.parametrize("value", [0, -1, "x", True, 10**6])
def test_without_resident_seconds_there_is_no_trainer(value: Any, tmp_path: Path) -> None:
    site = Site(tmp_path)
    assert site.resident("train", content(), context(**{"resident-seconds": value})) is None
    assert not site.started and not site.folder.exists()


def replied(site: Site) -> tuple[Message, int]:
    """The reply to a message, and how often the short process served it itself."""
    done: list[int] = []

    def work(_: RecordDict, __: Context) -> RecordDict:
        done.append(1)
        return content()

    message, held = Message(content(), dst_node_id=7, message_type="train"), context()
    reply = answer(work, message, held, lambda: 0.0, elsewhere=lambda records, c: site.resident("train", records, c))
    return reply, len(done)


def dies_before(connection: Any, own: bytes) -> None:
    greeted(connection, own)


def dies_after(connection: Any, own: bytes) -> None:
    accepted(connection, own)


def is_silent(connection: Any, own: bytes) -> None:
    accepted(connection, own)
    time.sleep(3)


def babbles(connection: Any, own: bytes) -> None:
    accepted(connection, own)
    send(connection, Kind.ANSWER, b"no answer", 5)


@pytest.mark.parametrize("script", [dies_after, is_silent, babbles], ids=lambda f: f.__name__)
def test_what_a_trainer_accepted_is_never_served_again(script: Callable[..., None], tmp_path: Path) -> None:
    reply, served = replied(Site(tmp_path, script=script))
    assert reply.error.reason == FAILURE and served == 0


def test_what_no_trainer_accepted_is_served_by_the_short_process(tmp_path: Path) -> None:
    reply, served = replied(Site(tmp_path, script=dies_before))
    assert reply.has_content() and served == 1


def test_a_trainer_that_cannot_be_started_is_done_without(tmp_path: Path) -> None:
    site = Site(tmp_path)
    dead: Any = Started(dead=True)
    assert replace(site.resident, start=lambda _: dead)("train", content(), context()) is None

    def fails(_: dict[str, object]) -> Any:
        raise OSError("no memory")

    assert replace(site.resident, start=fails)("train", content(), context()) is None


def test_a_second_message_at_once_is_served_without_the_trainer(tmp_path: Path) -> None:
    busy, go_on = threading.Event(), threading.Event()

    def slow(kind: str, records: RecordDict, held: Context) -> Told:
        busy.set()
        go_on.wait(10)
        return echo(kind, records, held)

    site, first = Site(tmp_path, slow), []
    long = replace(site.resident, patience=replace(site.resident.patience, silence=20.0))
    thread = threading.Thread(target=lambda: first.append(long("train", content(), context())))
    thread.start()
    assert busy.wait(5)
    assert site.resident("train", content(), context()) is None
    go_on.set()
    thread.join(10)
    assert first[0] is not None and len(site.started) == 1


def test_a_trainer_ends_with_the_process_that_waits_for_it(tmp_path: Path) -> None:
    """The short process gives up on it after a second of silence: the trainer is ended in the middle of its work."""
    site = Site(tmp_path, lambda *_: site.cut.wait(10) and Told(RecordDict()))  # type: ignore[arg-type, return-value]
    assert site.resident("train", content(), context()) == Told(None, FAILURE)
    wait_for("the trainer's end", site.cut.is_set, patience=5)


def test_only_flowers_own_process_for_a_message_asks_for_a_trainer() -> None:
    assert hand_over.serves_one_message(["/venv/bin/flwr-clientapp", "--insecure"])
    for arguments in ([], ["/venv/bin/pytest"], ["-c"], ["default_worker.py"], ["lalora", "run"]):
        assert not hand_over.serves_one_message(arguments)


def test_a_long_path_is_none_of_its_business(tmp_path: Path) -> None:
    with Place(tmp_path / ("x" * 120) / "deep", "0" * 16) as place, place.listen():
        connection = place.connect(1)
        assert connection is not None
        connection.close()


def test_the_way_to_the_trainer_needs_no_torch() -> None:
    code = (
        "import sys, lalora_flwr.client_app, lalora_flwr.site.resident.hand_over\n"
        "assert not {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
