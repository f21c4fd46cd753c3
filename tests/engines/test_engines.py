"""The inline engine, and the Ray engine with the simulation's process replaced."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lalora_flwr.engines import simulation
from lalora_flwr.engines.inline import run_inline
from lalora_flwr.engines.ray_process import RayProcess, environment
from lalora_flwr.ground.errors import LaloraError, RunFailed
from lalora_flwr.server.metrics import RoundMetrics
from lalora_flwr.settings import Settings
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


# the Ray engine, with another program in place of the simulation's

SERVER = """
import json, os, signal, sys, time
from pathlib import Path

resources, client_app = json.loads(sys.argv[1]), sys.argv[2]
print(json.dumps([resources, client_app]), flush=True)
values = json.loads(sys.stdin.readline())
folder = Path(values["output-dir"]) / values["run-name"]
folder.mkdir(exist_ok=True)
lines, names, end = json.loads(os.environ["SERVER"])
for number in range(lines):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"round": number + 1}) + "\\n")
    time.sleep(0.15)
for name in names:
    (folder / name).write_text(json.dumps({"error": "round 1: too many failures"}))
print("its last words")
sys.exit(end)
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RayProcess]:
    """In place of the simulation's process: one that writes lines of metrics and files as a server does, and ends."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a_server.py").write_text(SERVER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))

    def start(settings: Settings, *names: str, lines: int = 0, end: int = 0, num_actors: int = 0) -> RayProcess:
        monkeypatch.setenv("SERVER", json.dumps([lines, names, end]))
        return RayProcess(settings, num_actors, module="a_server")

    return start


def test_a_run_with_a_summary_succeeds_and_tells_each_line_once(server: Callable[..., RayProcess], tmp_path: Path) -> None:
    told: list[RoundMetrics] = []
    settings = small(tmp_path, train__num_threads=2)
    ready = server(settings, "summary.json", lines=3, num_actors=3)
    assert simulation.run_simulation(settings, told.append, ready=ready) == tmp_path / "run"
    assert told == [RoundMetrics(round=number) for number in (1, 2, 3)]
    said = (tmp_path / "run" / "flower.log").read_text().splitlines()
    needed = {"num_supernodes": 3, "num_cpus": 2, "num_gpus": 0.0, "num_actors": 3}
    assert json.loads(said[0]) == [needed, "lalora_flwr.client_app:app"]


@pytest.mark.parametrize(
    ("names", "end", "why"),
    [
        ([], 0, "without a result: .*its last words"),  # its exit status alone is not enough
        ([], 1, "without a result: .*its last words"),
        (["failure.json"], 1, "round 1: too many failures"),
        (["failure.json"], 0, "round 1: too many failures"),
    ],
)
def test_a_run_without_a_summary_failed_whatever_its_process_says(
    names: list[str], end: int, why: str, server: Callable[..., RayProcess], tmp_path: Path
) -> None:
    settings = small(tmp_path)
    with pytest.raises(RunFailed, match=f"(?s){why}"):
        simulation.run_simulation(settings, ready=server(settings, *names, lines=2, end=end))
    assert (tmp_path / "run" / "flower.log").exists()


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(
    server: Callable[..., RayProcess], tmp_path: Path, finished: Callable[..., Finished]
) -> None:
    """A server that finds the folder taken ends at once; the old summary must not pass for the new run's."""
    shutil.copytree(finished().path, tmp_path / "run")
    before, told = files_in(tmp_path / "run"), list[Any]()
    settings = small(tmp_path, seed=5)
    with server(settings) as ready, pytest.raises(LaloraError, match="holds a run already"):
        simulation.run_simulation(settings, told.append, ready=ready)
    assert files_in(tmp_path / "run") == before and not told


def test_a_process_that_is_told_nothing_ends_with_all_it_started(tmp_path: Path, server: Callable[..., RayProcess]) -> None:
    with server(small(tmp_path)) as ready:
        assert not ready.ended
    assert ready.ended


def test_flower_joins_no_cluster_by_chance_and_writes_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    env = environment(tmp_path)
    assert env["FLWR_HOME"] == str(tmp_path) and env["RAY_ADDRESS"] == "local"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert environment(tmp_path)["RAY_ADDRESS"] == "10.0.0.1:6379"
