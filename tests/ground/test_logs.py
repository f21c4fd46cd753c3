"""Logs as JSON: one object a line, whatever the message holds, and only if somebody asks for it."""

from __future__ import annotations

import io
import json
import logging
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from flwr.supercore.logger import ConsoleHandler

from lalora_flwr.ground import logs
from lalora_flwr.ground.logs import JsonLines, json_logs, wants_json

ASKED = {"LALORA_LOG": "json"}


@pytest.fixture
def flower() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    """Flower's logger with a console handler of its kind on a stream of the test's."""
    logger, stream = logging.getLogger("flwr"), io.StringIO()
    before = list(logger.handlers)
    handler = ConsoleHandler(stream=stream)
    handler.setLevel(logging.INFO)
    logger.handlers[:] = [handler]
    yield logger, stream
    logger.handlers[:] = before
    logging.captureWarnings(False)


def lines(stream: io.StringIO) -> list[dict[str, str]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_each_record_is_one_line_with_one_object(flower: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = flower
    json_logs(ASKED, logging.Logger("root"))
    json_logs(ASKED, logging.Logger("root"))
    assert len(logger.handlers) == 1
    logger.info('round %d, "ε"\nsecond line', 3)
    logger.debug("too little to be said")
    try:
        raise ValueError("broken\nin two")
    except ValueError:
        logger.exception("it failed")
    first, second = lines(stream)
    assert (first["level"], first["logger"], first["message"]) == ("INFO", "flwr", 'round 3, "ε"\nsecond line')
    assert abs((datetime.now(UTC) - datetime.fromisoformat(first["time"])).total_seconds()) < 3600
    assert second["message"] == "it failed" and second["exception"].endswith("ValueError: broken\nin two")


def test_nothing_changes_unless_it_is_asked_for(flower: tuple[logging.Logger, io.StringIO]) -> None:
    logger, _ = flower
    (before,) = logger.handlers
    json_logs({}, logging.Logger("root"))
    assert logger.handlers == [before]


def test_a_list_of_handlers_that_others_share_is_changed_in_place(flower: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = flower
    server = logging.Logger("lalora_flwr.server")
    server.handlers = logger.handlers  # as the ServerApp does
    json_logs(ASKED, logging.Logger("root"))
    server.warning("x")
    assert lines(stream)[0]["logger"] == "lalora_flwr.server"


def test_other_libraries_write_it_too_and_nothing_is_said_twice(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.Logger("root")
    json_logs(ASKED, root)
    root.handle(logging.makeLogRecord({"name": "py.warnings", "levelno": logging.WARNING, "msg": "old"}))
    root.handle(logging.makeLogRecord({"name": "flwr", "levelno": logging.WARNING, "msg": "said elsewhere"}))
    root.handle(logging.makeLogRecord({"name": "lalora_flwr.site", "levelno": logging.WARNING, "msg": "said elsewhere"}))
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "old"
    logging.captureWarnings(False)


def test_a_wrong_word_is_named() -> None:
    with pytest.raises(ValueError, match=r"^LALORA_LOG = 'jsn': must be json, or not set$"):
        wants_json({"LALORA_LOG": "jsn"})


def test_a_helper_process_can_run_the_file_by_its_path(flower: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = flower
    runpy.run_path(logs.__file__)["json_logs"](ASKED, logging.Logger("root"))
    json_logs(ASKED, logging.Logger("root"))
    logger.info("x")
    assert len(lines(stream)) == 1
    assert "lalora_flwr" not in [line.split()[1] for line in Path(logs.__file__).read_text().splitlines() if line[:5] == "from "]


def test_a_format_never_fails_on_what_is_logged() -> None:
    record = logging.makeLogRecord({"name": "x", "levelname": "INFO", "msg": "\ud800 \x00 %s", "args": (b"\xff",)})
    assert json.loads(JsonLines().format(record))["message"].startswith("\ud800 \x00")
    JsonLines().format(record).encode()


@pytest.mark.parametrize(("word", "code"), [("json", 0), ("jsn", 2)])
def test_the_command_takes_it_for_its_runs(word: str, code: int, tmp_path: Path) -> None:
    wanted = "run-name=run num-rounds=1 num-supernodes=2 train.local-steps=1 lora.rank=2 privacy.accountant=rdp"
    command = [sys.executable, "-m", "lalora_flwr", "run", "--engine", "inline", "-c", wanted]
    env = {**os.environ, "LALORA_LOG": word}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == code
    if code:
        assert done.stderr == "lalora: LALORA_LOG = 'jsn': must be json, or not set\n"
    else:
        said = [json.loads(line) for line in (tmp_path / "runs" / "run" / "flower.log").read_text().splitlines()]
        assert {"time", "level", "logger", "message"} <= set(said[0]) and len(said) > 3
