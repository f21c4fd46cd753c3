"""What a run's folder says when the process of its server is told to end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.supercore.run import RunNotRunningException

from lalora_flwr.engines.inline import InlineGrid
from lalora_flwr.ground.errors import RunFailed
from lalora_flwr.server import ending
from lalora_flwr.server.ending import ORPHANED, STOPPED, last_word
from lalora_flwr.server.folder import RunFolder
from lalora_flwr.server.run import run_federation
from lalora_flwr.settings import flatten
from tests.conftest import AppCall, Spy, small, strict_json


def said(folder: Path) -> str:
    return str(strict_json((folder / "run" / "failure.json").read_text())["error"])


def test_a_process_that_is_told_to_end_in_a_round_says_so_and_then_the_run_goes_on(tmp_path: Path) -> None:
    handlers: list[Callable[[], None]] = []

    def ends_in_round_2(message: Message, context: Context, app: AppCall) -> Message:
        if message.metadata.message_type == "train" and message.content["config"]["server-round"] == 2:
            handlers[0]()  # as Flower does in its signal handler, wherever the run is
            raise SystemExit
        return app(message, context)

    settings = small(tmp_path, privacy__epsilon=float("inf"))
    app: Any = Spy(ends_in_round_2)
    with pytest.raises(SystemExit):
        run_federation(settings, InlineGrid(app, 3, dict(flatten(settings))), at_exit=handlers.append)
    assert said(tmp_path) == STOPPED and "\n" not in STOPPED + ORPHANED
    settings, app = small(tmp_path, privacy__epsilon=float("inf"), resume=True), Spy()
    folder = run_federation(settings, InlineGrid(app, 3, dict(flatten(settings))), at_exit=handlers.append)
    for handler in handlers:  # Flower calls them at the end of every process
        handler()
    assert (folder / "summary.json").exists() and not (folder / "failure.json").exists()
    assert not app.training(1) and len(app.training(2)) == 3


def test_a_superlink_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: list[Callable[[], None]] = []
    with RunFolder(small(tmp_path)) as folder, last_word(folder, handlers.append):
        parent = os.getppid()
        monkeypatch.setattr(ending.os, "getppid", lambda: parent + 1)  # an orphan's new parent
        handlers[0]()
    assert said(tmp_path) == ORPHANED


def test_a_folder_that_says_why_the_run_failed_keeps_its_reason(tmp_path: Path) -> None:
    handlers: list[Callable[[], None]] = []
    with RunFolder(small(tmp_path)) as folder, last_word(folder, handlers.append):
        folder.fail("round 1: too many failures")
        handlers[0]()
        assert said(tmp_path) == "round 1: too many failures"


def test_after_the_run_the_end_of_the_process_says_nothing(tmp_path: Path) -> None:
    handlers: list[Callable[[], None]] = []
    with RunFolder(small(tmp_path)) as folder, last_word(folder, handlers.append):
        pass
    handlers[0]()
    assert not (tmp_path / "run" / "failure.json").exists()


def test_a_run_that_flower_says_was_stopped_says_so_in_one_line(tmp_path: Path) -> None:
    class Stopped(InlineGrid):
        def get_node_ids(self) -> list[int]:
            raise RunNotRunningException

    settings = small(tmp_path)
    app: Any = Spy()
    with pytest.raises(RunFailed):
        run_federation(settings, Stopped(app, 3, dict(flatten(settings))))
    assert said(tmp_path) == STOPPED
