"""A run that died goes on to the very result it would have had."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Error, Message, MetricRecord, RecordDict

from lalora_flwr.engines.inline import run_inline
from lalora_flwr.ground.errors import ConfigError, RunFailed
from lalora_flwr.privacy.accounting import epsilon_spent
from lalora_flwr.server import folder as run_folder
from lalora_flwr.server import run as federation
from lalora_flwr.server.metrics import RoundMetrics
from lalora_flwr.settings import Settings
from lalora_flwr.wire.replies import COUNTERS
from tests.conftest import AppCall, Finished, Spy, files_in, rounded, run_spied, small, strict_json

MakeFinished = Callable[..., Finished]
MIXED = {"strategy": "rolora", "num_rounds": 4, "num_supernodes": 4, "fraction_train": 0.5, "evaluate_every": 2}

DIFFERING = {  # ranks and layers, and a filter that remembers gradients of their shapes
    **{"strategy": "hetlora", "profiles": "rank=1;rank=1 layers=1 steps=1;layers=1", "num_rounds": 3, "num_supernodes": 4},
    **{"fraction_train": 0.5, "filter__name": "disk", "lora__head": "trained"},
}
AVERAGED = {"num_rounds": 8, "merge__average": "ema"}


class Killed(BaseException):
    """Ends a run where it is, past every handler."""


def result(folder: Path) -> tuple[bytes, list[dict[str, Any]], dict[str, Any]]:
    """Adapter, metrics and summary without times and memory."""
    lines = [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = strict_json((folder / "summary.json").read_text())
    for record in (*lines, summary):
        for key in ("seconds", "peak_memory_mb", "date"):
            record.pop(key, None)
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes(), rounded(lines), rounded(summary)


def killed_after(settings: Settings, rounds: int, app: Any = None) -> None:
    def on_round(line: RoundMetrics) -> None:
        if line.round == rounds:
            raise Killed

    with pytest.raises(Killed):
        run_inline(settings, on_round, app)


def resumed(folder: Path, **overrides: Any) -> Settings:
    return small(folder, resume=True, **overrides)


@pytest.mark.parametrize(
    ("overrides", "rounds"),
    [
        ({"num_rounds": 3}, 1),
        ({"num_rounds": 3}, 2),
        ({"num_rounds": 3}, 3),
        (MIXED, 1),
        (MIXED, 3),
        (DIFFERING, 2),
        (AVERAGED, 5),
        (AVERAGED, 8),
    ],
    ids=str,
)
def test_a_resumed_run_ends_like_one_that_was_never_stopped(
    overrides: dict[str, Any], rounds: int, tmp_path: Path, finished: MakeFinished
) -> None:
    killed_after(small(tmp_path, **overrides), rounds)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert result(run_inline(resumed(tmp_path, **overrides))) == result(finished(**overrides).path)


def test_it_can_die_several_times(tmp_path: Path, finished: MakeFinished) -> None:
    killed_after(small(tmp_path, **MIXED), 1)
    killed_after(resumed(tmp_path, **MIXED), 2)
    killed_after(resumed(tmp_path, **MIXED), 3)
    assert result(run_inline(resumed(tmp_path, **MIXED))) == result(finished(**MIXED).path)


def test_rounds_that_are_done_are_not_asked_of_the_sites_again(tmp_path: Path) -> None:
    killed_after(small(tmp_path, num_rounds=3), 2)
    spy = Spy()
    run_spied(resumed(tmp_path, num_rounds=3), spy)
    assert not spy.training(1) and not spy.training(2) and len(spy.training(3)) == 3
    steps = [int(reply.content[COUNTERS]["steps"]) for _, reply in spy.training(3)]  # type: ignore[arg-type, call-overload, index]
    assert steps == [6, 6, 6]  # two local steps a round: those before the stop count


def test_a_round_that_failed_on_a_site_counts_in_full_after_a_resume(tmp_path: Path) -> None:
    def behaviour(message: Message, context: Context, app: AppCall) -> Message:
        reply = app(message, context)
        context.state = RecordDict()  # a worker that dies takes the site's own count with it
        return reply

    spy = Spy(behaviour)
    run_spied(small(tmp_path, num_rounds=3), spy)
    steps = [int(reply.content[COUNTERS]["steps"]) for _, reply in spy.training(3)]  # type: ignore[arg-type, call-overload, index]
    assert steps == [6, 6, 6]


@pytest.mark.parametrize("write", range(12))
def test_a_crash_at_any_write_loses_nothing(
    write: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: MakeFinished
) -> None:
    real, count = run_folder._write, 0

    def crashing(path: Path, data: bytes | str) -> None:
        nonlocal count
        count += 1
        if count > write:
            raise Killed
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "_write", crashing)
        with contextlib.suppress(Killed):
            run_inline(small(tmp_path, **MIXED))
    if (tmp_path / "run" / "summary.json").exists():  # fewer writes than this
        return
    again = resumed(tmp_path, **MIXED) if (tmp_path / "run" / "config.toml").exists() else small(tmp_path, **MIXED)
    assert result(run_inline(again)) == result(finished(**MIXED).path)


def test_a_failure_of_the_first_attempt_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("no more memory")

    with monkeypatch.context() as patch:
        patch.setattr(federation, "score_figure", broken)
        with pytest.raises(ValueError, match="no more memory"):
            run_inline(small(tmp_path))
    assert (tmp_path / "run" / "failure.json").exists()
    run_inline(resumed(tmp_path))
    assert not (tmp_path / "run" / "failure.json").exists()


def test_only_an_unchanged_unfinished_run_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run to resume"):
        run_inline(resumed(tmp_path))
    killed_after(small(tmp_path), 1)
    before = files_in(tmp_path)
    with pytest.raises(ConfigError, match=r"^train.lr = 0.1: the run to resume has 0.5"):
        run_inline(resumed(tmp_path, train__lr=0.1))
    assert files_in(tmp_path) == before
    run_inline(resumed(tmp_path))
    with pytest.raises(ConfigError, match="finished run"):
        run_inline(resumed(tmp_path))


@pytest.mark.parametrize("damage", [b"", b"not safetensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_checkpoint_is_said_and_not_overwritten(damage: bytes, tmp_path: Path) -> None:
    killed_after(small(tmp_path), 1)
    path = tmp_path / "run" / "checkpoint" / "adapter.safetensors"
    path.write_bytes(damage)
    with pytest.raises(RunFailed, match="is damaged"):
        run_inline(resumed(tmp_path))
    assert path.read_bytes() == damage


def test_two_processes_never_write_one_run(tmp_path: Path) -> None:
    with run_folder.RunFolder(small(tmp_path)), pytest.raises(ConfigError, match="another process still writes"):
        run_folder.RunFolder(resumed(tmp_path))
    with run_folder.RunFolder(resumed(tmp_path)):
        pass


KILLS = 12  # of the server's process in one test


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [Path(sys.executable).with_name("lalora"), "run", "--engine", "inline", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


@pytest.mark.faults
def test_killed_at_random_moments_it_still_ends_the_same(tmp_path: Path) -> None:
    """Real processes, kill -9: each attempt gets through at most a few rounds."""
    flat = {"num-rounds": 5 * KILLS, "train.local-steps": 2, "lora.rank": 2, "run-name": "run"}
    pairs = " ".join(f"{key}={value}" for key, value in flat.items())
    (tmp_path / "whole").mkdir()
    whole = start(tmp_path / "whole", "-c", pairs)
    assert whole.wait(300) == 0
    lines = (tmp_path / "whole" / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    a_round = statistics.median(strict_json(line)["seconds"] for line in lines)
    draw, metrics = random.Random(0), tmp_path / "runs" / "run" / "metrics.jsonl"
    process, kills = start(tmp_path, "-c", pairs), 0
    while True:
        done = metrics.read_text().count("\n") if metrics.exists() else 0
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            now = metrics.read_text().count("\n") if metrics.exists() else 0
            if now > done and kills < KILLS:
                time.sleep(draw.uniform(0, 1.5 * a_round))  # anywhere in the next round, or early in the one after it
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        code = process.wait(120)
        if code == 0:
            break
        assert code == -signal.SIGKILL, process.stderr.read() if process.stderr else b""
        process = start(tmp_path, "--resume", "runs/run")
    assert kills == KILLS
    assert result(tmp_path / "runs" / "run") == result(tmp_path / "whole" / "runs" / "run")


def as_real_sites(lost: Callable[[Message], bool]) -> Callable[[Message, Context, AppCall], Message]:
    """Sites that the server takes for real ones; the server dies at the first reply of the rounds named by ``lost``."""

    def behaviour(message: Message, context: Context, app: AppCall) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "train" and lost(message):
            raise Killed
        if message.metadata.message_type == "query.identity":
            reply.content["identity"] = MetricRecord({"site": -1, "sites": -1})
        elif not reply.has_error():
            reply.content[COUNTERS]["seeded"] = 0  # type: ignore[index]
        return reply

    return behaviour


def dies_in(server_round: int) -> Callable[[Message], bool]:
    return lambda message: message.content["config"]["server-round"] == server_round


def test_a_round_that_real_sites_served_and_the_server_lost_stays_counted(tmp_path: Path) -> None:
    """Its noise is drawn anew when it is repeated, so it is one more release."""
    values: dict[str, Any] = {"num_rounds": 3, "privacy__max_rounds": 5}
    for again, rounds in ((False, 2), (True, 2)):  # lost twice
        with pytest.raises(Killed):
            run_spied(small(tmp_path, resume=again, **values), Spy(as_real_sites(dies_in(rounds))))
    settings, spy = resumed(tmp_path, **values), Spy(as_real_sites(dies_in(99)))
    run = Finished(run_spied(settings, spy), settings, spy)
    told = [int(order.content["config"]["counted-steps"]) for order, _ in spy.training(2)]  # type: ignore[arg-type, call-overload, index]
    assert told == [3 * settings.train.local_steps] * 3  # one round finished, two lost
    assert {site["steps"] for site in run.summary["sites"].values()} == {5 * settings.train.local_steps}
    sigma, q = run.summary["noise_multiplier"], run.summary["sample_rate"]
    epsilon = epsilon_spent([(sigma, q, 5 * settings.train.local_steps)], settings.privacy.delta)
    assert run.summary["epsilon"] == pytest.approx(epsilon) and epsilon <= settings.privacy.epsilon


def test_without_room_for_a_lost_round_a_resumed_run_ends_early_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run_spied(small(tmp_path, num_rounds=3), Spy(as_real_sites(dies_in(2))))
    settings, spy = resumed(tmp_path, num_rounds=3), Spy(as_real_sites(dies_in(99)))
    run = Finished(run_spied(settings, spy), settings, spy)
    assert [line["round"] for line in run.metrics] == [1, 2] and run.summary["rounds"] == 2
    assert "no site may serve another round" in run.summary["ended_early"]
    assert run.summary["epsilon"] <= settings.privacy.epsilon and not (run.path / "failure.json").exists()


def test_a_site_that_is_not_heard_of_after_a_resume_counts_the_lost_round_too(tmp_path: Path) -> None:
    values: dict[str, Any] = {"num_rounds": 3, "privacy__max_rounds": 4, "max_failures": 1}
    with pytest.raises(Killed):
        run_spied(small(tmp_path, **values), Spy(as_real_sites(dies_in(2))))

    def silent(message: Message, context: Context, app: AppCall) -> Message:
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 2:
            return Message(Error(code=5, reason="out of reach"), reply_to=message)
        return as_real_sites(dies_in(99))(message, context, app)

    settings, spy = resumed(tmp_path, **values), Spy(silent)
    run = Finished(run_spied(settings, spy), settings, spy)
    assert {site["steps"] for site in run.summary["sites"].values()} == {8}  # one finished, one lost, two asked in vain
    spent = [site["epsilon"] for site in run.summary["sites"].values()]
    assert max(spent) - min(spent) < 0.01  # PRV's error, for the same steps in one piece and in two
