"""The Ray engine itself: the inline engine's bytes, and no process left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lalora_flwr.engines import simulation
from lalora_flwr.engines.inline import run_inline
from lalora_flwr.ground.errors import RunFailed, WorkerDied
from lalora_flwr.server.metrics import RoundMetrics
from tests.cli.commands import pairs, real_lalora
from tests.conftest import Finished, rounded, small, strict_json
from tests.faulty_client import NOTES, SECRET

ROOT = Path(__file__).parents[2]


REASON = "failure: the site's own log says why"


def without_seconds(folder: Path) -> list[dict[str, Any]]:
    lines = [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "peak_memory_mb")} for line in lines]


def same_result(folder: Path, other: Path) -> bool:
    adapters = [(f / "adapter" / "adapter_model.safetensors").read_bytes() for f in (folder, other)]
    summaries = [strict_json((f / "summary.json").read_text()) for f in (folder, other)]
    for summary in summaries:
        del summary["seconds"], summary["peak_memory_mb"], summary["date"]
    pairs_of = (adapters, rounded(summaries), rounded([without_seconds(folder), without_seconds(other)]))
    return all(one == two for one, two in pairs_of)


class Marked:
    """All processes that descend from this test, by a mark in their environment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._mark = uuid.uuid4().hex
        monkeypatch.setenv("LALORA_TEST_MARK", self._mark)

    def alive(self) -> dict[int, str]:
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self._mark.encode() in (folder / "environ").read_bytes() and int(folder.name) != os.getpid():
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (OSError, ValueError):
                continue
        return found

    def gone(self, patience: float = 5.0) -> dict[int, str]:
        """What is still alive after some seconds, in which the kernel may clear away what was killed."""
        deadline = time.monotonic() + patience
        while (left := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Marked]:
    mark = Marked(monkeypatch)
    yield mark
    for process in mark.alive():  # what the test has just complained about
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


# the Ray engine itself


@pytest.mark.slow
def test_one_ray_worker_gives_the_inline_engines_bytes(tmp_path: Path, marked: Marked, finished: Callable[..., Finished]) -> None:
    """Of a run whose sites share one noise; the next test has one whose sites do not."""
    shared: dict[str, Any] = {"num_supernodes": 3, "trust": "secure-sum", "train__local_steps": 1, "lora__head": "ridge"}
    shared |= {"train__lr": 0.0, "strategy": "steady-lora"}
    code, out, err = real_lalora(tmp_path, "run", "--num-actors", "1", "-c", pairs(output_dir="out", run_name="run", **shared))
    assert (code, err) == (0, "")
    assert same_result(tmp_path / "out" / "run", finished(**shared).path)
    assert "1/2" in out and "2/2" in out and "seeded" in out
    assert not marked.gone()


@pytest.mark.slow
def test_two_ray_workers_give_the_inline_engines_bytes_and_load_everything_once(
    tmp_path: Path, marked: Marked, monkeypatch: pytest.MonkeyPatch, finished: Callable[..., Finished]
) -> None:
    (tmp_path / "notes").mkdir()
    monkeypatch.setenv(NOTES, str(tmp_path / "notes"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    told: list[RoundMetrics] = []
    during: dict[int, str] = {}

    def on_round(line: RoundMetrics) -> None:
        told.append(line)
        during.update(marked.alive())

    folder = simulation.run_simulation(small(tmp_path), on_round, num_actors=2, client_app="tests.faulty_client:spying")
    left = marked.gone()
    assert same_result(folder, finished().path)
    assert [line.round for line in told] == [1, 2]
    notes = [json.loads(path.read_text()) for path in sorted((tmp_path / "notes").iterdir())]
    assert len(notes) == 6 and {note["threads"] for note in notes} == {1}
    assert 1 < len({note["pid"] for note in notes}) <= 2
    assert all(note["loads"] == {"model": 1, "data": 1} for note in notes)
    assert any("ray::" in command for command in during.values()) and not left


@pytest.mark.slow
def test_many_sites_of_which_few_have_orders_are_who_they_are_inline(tmp_path: Path, finished: Callable[..., Finished]) -> None:
    """Not greeted one by one: Flower looks at each message once for each site."""
    many: dict[str, Any] = {"num_supernodes": 200, "fraction_train": 0.02, "data__min_records": 1}
    folder = simulation.run_simulation(small(tmp_path, **many), num_actors=1)
    assert same_result(folder, finished(**many).path)


@pytest.mark.slow
def test_what_stays_at_virtual_sites_under_ray_is_what_stays_inline(tmp_path: Path, finished: Callable[..., Finished]) -> None:
    stays: dict[str, Any] = {"strategy": "fedsa-lora", "num_rounds": 3}
    folder = simulation.run_simulation(small(tmp_path, **stays), num_actors=2)
    assert same_result(folder, finished(**stays).path)
    checkpoints = [(path / "checkpoint" / "adapter.safetensors") for path in (folder, finished(**stays).path)]
    one, other = (load_file(path) for path in checkpoints)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any("lora_B" in name and name.startswith("more/site/") for name in one)


@pytest.mark.slow
def test_a_client_that_fails_under_ray_fails_the_run_and_its_log_is_kept(
    tmp_path: Path, marked: Marked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(RunFailed, match=f"round 1: 3 of 3 sites failed, no site is left .*{REASON}") as stopped:
        simulation.run_simulation(small(tmp_path), num_actors=1, client_app="tests.faulty_client:app")
    assert SECRET not in str(stopped.value)
    assert strict_json((tmp_path / "run" / "failure.json").read_text()) == {"error": str(stopped.value)}
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not marked.gone()
    assert REASON in (tmp_path / "run" / "flower.log").read_text()


@pytest.mark.faults
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_dead_ray_worker_costs_a_round_and_no_result(
    restarts: int, tmp_path: Path, marked: Marked, monkeypatch: pytest.MonkeyPatch, finished: Callable[..., Finished]
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "deaths").write_text("1")
    monkeypatch.setenv(NOTES, str(tmp_path / "notes"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    told: list[int] = []

    def told_by(line: RoundMetrics) -> None:
        told.append(line.round)

    def run() -> Path:
        client = "tests.faulty_client:dying"
        return simulation.run_simulation(small(tmp_path), told_by, client_app=client, restarts=restarts)

    if restarts:
        assert same_result(run(), finished().path) and told == [1, 2]
    else:
        with pytest.raises(WorkerDied, match=r"^round 2: the Ray worker that served site 1 died.*--resume"):
            run()
        assert told == [1]
        assert same_result(run_inline(small(tmp_path, resume=True)), finished().path)  # what was done is not lost
    assert not marked.gone()


@pytest.mark.slow
def test_an_interrupted_ray_run_leaves_no_process(tmp_path: Path, marked: Marked) -> None:
    def interrupt(line: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulation.run_simulation(small(tmp_path, num_rounds=500), interrupt, num_actors=1)
    assert not marked.gone()
    assert (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.faults
def test_a_killed_ray_run_leaves_no_process_and_goes_on(
    tmp_path: Path, marked: Marked, finished: Callable[..., Finished]
) -> None:
    rounds = 25  # Flower takes a moment to stop
    values = {"num_rounds": rounds, "num_supernodes": 3, "output_dir": "out", "run_name": "run"}
    command = [Path(sys.executable).with_name("lalora"), "run", "-c", pairs(**values)]
    metrics = tmp_path / "out" / "run" / "metrics.jsonl"
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not metrics.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    agent = re.compile(r"ray::(Dashboard|RuntimeEnv)Agent\b")  # look for their master now and then, and run nothing
    deadline = time.monotonic() + 60
    while (left := [c for c in marked.alive().values() if not agent.match(c)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    assert not (tmp_path / "out" / "run" / "summary.json").exists(), "the run was over before it was killed"
    code, _, err = real_lalora(tmp_path, "run", "--resume", "out/run")
    assert (code, err) == (0, "")
    assert same_result(tmp_path / "out" / "run", finished(num_rounds=rounds).path)
