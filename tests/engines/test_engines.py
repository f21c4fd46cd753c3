"""The inline engine, and the Ray engine with Flower's commands replaced."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lalora_flwr.engines import simulation
from lalora_flwr.engines.inline import run_inline
from lalora_flwr.ground.errors import LaloraError, RunFailed
from lalora_flwr.server.metrics import RoundMetrics
from lalora_flwr.settings import flatten, settings_from
from tests.conftest import Finished, files_in, small

# the inline engine


def test_loggers_are_as_before_after_an_inline_run(tmp_path: Path) -> None:
    names = ("flwr", "lalora_flwr", "lalora_flwr.site")
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in map(logging.getLogger, names)]
    path = run_inline(small(tmp_path, num_rounds=1, privacy__epsilon=float("inf")))
    assert [(logger.handlers, logger.propagate, logger.level) for logger in map(logging.getLogger, names)] == before
    log = (path / "flower.log").read_text()
    assert "[ROUND 1/1]" in log and "mean loss" not in log  # the sites' training losses are raw


def test_each_site_keeps_a_context_of_its_own(finished: Callable[..., Finished]) -> None:
    contexts = finished().spy.contexts
    assert sorted(contexts) == [0, 1, 2] and len({id(c.state) for c in contexts.values()}) == 3
    assert [list(contexts[number].state["ledger"]["steps"]) for number in sorted(contexts)] == [[4]] * 3
    assert all(c.node_id != number for number, c in contexts.items())


# the Ray engine, with Flower's commands replaced

Server = Callable[[Path], str]


@pytest.fixture
def flower(tmp_path: Path) -> Callable[[Server], tuple[simulation.Flower, list[tuple[str, ...]]]]:
    """In place of Flower: ``server`` gets the run folder, does what a ServerApp does, and returns how the run ended."""

    def install(server: Server) -> tuple[simulation.Flower, list[tuple[str, ...]]]:
        asked: list[tuple[str, ...]] = []

        @contextmanager
        def superlink(home: Path, log: Path) -> Iterator[dict[str, str]]:
            log.write_text("Flower's own words\n")
            yield {}

        def flwr(env: dict[str, str], *arguments: str) -> dict[str, Any]:
            asked.append(arguments)
            if arguments[0] == "run":
                return {"run-id": 1}
            return {"runs": [{"status": server(tmp_path / "run"), "status-details": "in words"}]}

        return simulation.Flower(superlink, flwr, lambda *_: None, check_seconds=0.0), asked

    return install


def writes(*names: str, lines: int = 0, end: str = "finished:completed") -> Server:
    """A ServerApp that writes a line of metrics each time it is looked at, leaves some files, and ends."""
    written: list[str] = []

    def server(folder: Path) -> str:
        folder.mkdir(exist_ok=True)
        if len(written) < lines:
            written.append(f'{{"round": {len(written) + 1}}}\n')
            (folder / "metrics.jsonl").write_text("".join(written))
            return "running"
        for name in names:
            (folder / name).write_text(json.dumps({"error": "round 1: too many failures"}))
        return end

    return server


def test_a_run_with_a_summary_succeeds_and_tells_each_line_once(flower: Any, tmp_path: Path) -> None:
    commands, asked = flower(writes("summary.json", lines=3))
    told: list[RoundMetrics] = []
    settings = small(tmp_path, train__num_threads=2)
    assert simulation.run_simulation(settings, told.append, num_actors=3, flower=commands) == tmp_path / "run"
    assert told == [RoundMetrics(round=number) for number in (1, 2, 3)]
    assert (tmp_path / "run" / "flower.log").read_text() == "Flower's own words\n"
    assert asked[0][2:] == (
        "--federation-config",
        "num-supernodes=3 client-resources-num-cpus=2 init-args-num-cpus=6",
    )


@pytest.mark.parametrize(
    ("server", "why"),
    [
        (writes(lines=2), "finished:completed in words"),  # Flower's word alone is not enough
        (writes(end="finished:failed"), "finished:failed in words"),
        (writes("failure.json", end="finished:failed"), "round 1: too many failures"),
        (writes("failure.json", end="finished:completed"), "round 1: too many failures"),
    ],
)
def test_a_run_without_a_summary_failed_whatever_flower_says(server: Server, why: str, flower: Any, tmp_path: Path) -> None:
    commands, _ = flower(server)
    with pytest.raises(RunFailed, match=why):
        simulation.run_simulation(small(tmp_path), flower=commands)
    assert (tmp_path / "run" / "flower.log").exists()


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(
    flower: Any, tmp_path: Path, finished: Callable[..., Finished]
) -> None:
    """A server that finds the folder taken ends at once; the old summary must not pass for the new run's."""
    shutil.copytree(finished().path, tmp_path / "run")
    before, told = files_in(tmp_path), list[Any]()
    commands, _ = flower(lambda folder: "finished:failed")
    with pytest.raises(LaloraError, match="holds a run already"):
        simulation.run_simulation(small(tmp_path, seed=5), told.append, flower=commands)
    assert files_in(tmp_path) == before and not told


def test_flower_gets_every_setting_and_no_dependency(tmp_path: Path) -> None:
    settings = small(tmp_path, privacy__epsilon=float("inf"), lora__schedule="step:B3A2", train__lr=1.0)
    simulation._write_app(tmp_path / "app", settings, simulation.CLIENT_APP)
    project = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())
    config = project["tool"]["flwr"]["app"]["config"]
    assert config == flatten(settings) and settings_from(config) == settings
    assert project["project"]["dependencies"] == []
    assert [path.name for path in (tmp_path / "app").iterdir()] == ["pyproject.toml"]


def test_flower_installs_nothing_and_joins_no_cluster_by_chance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    env = simulation._environment(tmp_path)
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert env["FLWR_HOME"] == str(tmp_path) and env["RAY_ADDRESS"] == "local"
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert simulation._environment(tmp_path)["RAY_ADDRESS"] == "10.0.0.1:6379"


def fake_command(folder: Path, name: str, script: str) -> dict[str, str]:
    """An environment in which a command is this shell script."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("""echo '{"success": false, "error-message": "no such run"}'""", "flwr list: no such run"),
        ("""echo '{"success": false, "error-message": "no such run"}'; exit 1""", "flwr list: no such run"),
        ("echo connection refused >&2; exit 1", "flwr list: connection refused"),
        ("""echo '{"runs": []}'; exit 3""", "flwr list: "),
    ],
)
def test_a_flwr_command_that_fails_fails_the_run(script: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=why):
        simulation._flwr(fake_command(tmp_path, "flwr", script), "list")


def test_a_superlink_that_does_not_start_fails_the_run_with_its_words(tmp_path: Path) -> None:
    env = fake_command(tmp_path / "bin", "flower-superlink", "echo the port is taken; exit 1")
    flower = simulation.Flower(lambda home, log: simulation._superlink(home, log, lambda home: env))
    with pytest.raises(RunFailed, match="the port is taken"):
        simulation.run_simulation(small(tmp_path), flower=flower)
    assert "the port is taken" in (tmp_path / "run" / "flower.log").read_text()
