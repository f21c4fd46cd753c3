"""Our trackers against their own libraries: what was written is read back with them. No network."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lalora_flwr.engines.inline import run_inline
from lalora_flwr.server.metrics import RoundMetrics
from lalora_flwr.server.tracking import dropped
from lalora_flwr.settings import Settings
from tests.conftest import MODELS, files_in, small, strict_json


class Killed(BaseException):
    """Ends a run where it is."""


def kill(line: RoundMetrics) -> None:
    if line.round == 2:
        raise Killed


def killed_and_resumed(folder: Path, **overrides: Any) -> Path:
    """A run of three rounds that died after the second and went on."""
    with pytest.raises(Killed):
        run_inline(small(folder, num_rounds=3, **overrides), kill, models=MODELS)
    return run_inline(small(folder, num_rounds=3, resume=True, **overrides), models=MODELS)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    assert not dropped(folder), (folder / "flower.log").read_text()
    return [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """What of a line of metrics.jsonl is a number."""
    found = {name: value for name, value in line.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    return {name: value for name, value in found.items() if name != "round"}


def test_tensorboard_holds_each_round_once_over_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = killed_and_resumed(tmp_path, track="tensorboard")
    lines = lines_of(folder)
    read = EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    for name in numbers(lines[0]):
        shown = [(event.step, event.value) for event in read.Scalars(name)]
        assert shown == [(line["round"], pytest.approx(line[name], rel=1e-6)) for line in lines], name
    (config,) = read.Tensors("config/text_summary")
    (summary,) = read.Tensors("summary/text_summary")
    assert b'"strategy": "la-lora"' in config.tensor_proto.string_val[0]
    assert b'"epsilon"' in summary.tensor_proto.string_val[0] and summary.step == 3


def test_a_round_that_tensorboard_got_and_the_run_lost_is_written_over(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from lalora_flwr.server.trackers.tensorboard import TensorBoard

    for rounds in ((1, 2), (2, 3)):
        tracker = TensorBoard()
        tracker.start(small(tmp_path), tmp_path)
        for number in rounds:
            tracker.round(RoundMetrics(round=number, sites=number * len(rounds)))
        tracker.finish(None)
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("sites")] == [(1, 2), (2, 4), (3, 6)]


def records_in(content: bytes) -> Iterator[bytes]:
    """The records of a ``.wandb`` file: LevelDB's log format, blocks of 32 KiB of parts with 7 bytes before each."""
    at, whole = 7, b""  # behind the file's own header
    while at + 7 < len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", content, at + 4)
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part of several
            yield whole
            whole = b""


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.mark.usefixtures("offline")
def test_wandb_holds_the_rounds_under_one_id_and_nothing_of_the_machine(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    folder = killed_and_resumed(tmp_path, track="wandb")
    lines = lines_of(folder)
    shown: dict[int, dict[str, str]] = {}
    ids, text = set(), b""
    stores = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(stores) == 2  # one an attempt
    for path in stores:
        text += path.read_bytes()
        for data in records_in(path.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                shown[int(values["round"])] = values
    assert len(ids) == 1 and ids == {(folder / "tracking" / "wandb").read_text().strip()}
    assert sorted(shown) == [1, 2, 3]
    for line in lines:
        for name, value in numbers(line).items():
            assert float(shown[line["round"]][name]) == pytest.approx(value), name
    for private in (socket.gethostname() if len(socket.gethostname()) > 3 else "", str(tmp_path), "requirements"):
        assert not private or private.encode() not in text, private
    assert not [name for name in files_in(folder / "wandb") if name.endswith(("requirements.txt", "output.log", "diff.patch"))]


@pytest.mark.slow
def test_wandb_without_a_login_is_dropped_and_asks_nobody(tmp_path: Path) -> None:
    """In a process of its own, since the library keeps what it once read of its environment; the command says it at the end."""
    pytest.importorskip("wandb")
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | {"HOME": str(tmp_path)}
    wanted = "track=wandb run-name=run num-rounds=1 num-supernodes=2 train.local-steps=1 lora.rank=2 privacy.accountant=rdp"
    command = [sys.executable, "-m", "lalora_flwr", "run", "--engine", "inline", "-c", wanted]
    done = subprocess.run(command, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "the run went on without its tracker wandb: RuntimeError: not logged in to W&B" in done.stdout
    assert (tmp_path / "runs" / "run" / "summary.json").exists()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The store that MLflow's tracker takes if nobody names one."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_mlflow_holds_each_round_once_over_a_resume(tmp_path: Path, store: str) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    folder = killed_and_resumed(tmp_path, track="mlflow")
    lines, client = lines_of(folder), MlflowClient(store)
    experiment = client.get_experiment_by_name("lalora-flwr")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["strategy"] == "la-lora" and run.data.params["privacy.epsilon"] == "4.0"
    assert set(run.data.tags) == {"mlflow.runName"}
    for name in numbers(lines[0]):
        history = sorted((one.step, one.value) for one in client.get_metric_history(run.info.run_id, name))
        assert history == [(line["round"], pytest.approx(line[name])) for line in lines], name
    summary = strict_json((folder / "summary.json").read_text())
    assert run.data.metrics["final/epsilon"] == pytest.approx(summary["epsilon"])


def test_mlflow_says_of_a_run_that_stopped_that_it_failed(tmp_path: Path, store: str) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    settings: Settings = small(tmp_path, num_rounds=3, track="mlflow")
    with pytest.raises(Killed):
        run_inline(settings, kill, models=MODELS)
    client = MlflowClient(store)
    (run,) = client.search_runs([client.create_experiment("x"), "1"])
    assert run.info.status == "FAILED"
