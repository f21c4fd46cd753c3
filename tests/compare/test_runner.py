"""Whole comparisons in worker processes whose runs are stand-ins."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lalora_flwr.compare.cells import Plan
from lalora_flwr.compare.folder import locked
from lalora_flwr.compare.grid import read_grid
from lalora_flwr.compare.runner import Comparison, default_workers
from lalora_flwr.ground.errors import ConfigError, RunFailed
from tests.compare import jobs
from tests.compare.made import BASE, accuracy_for, flat

SETS = [f"{key}={value}" for key, value in BASE.items() if key not in ("seed", "train.lr", "privacy.epsilon")]
Job = Callable[[dict[str, Any]], None]


def comparison(
    out: Path,
    *over: str,
    tune: tuple[str, ...] = (),
    job: Job = jobs.pretend,
    workers: int = 1,
    terminal: bool = False,
    grid: str = "",
) -> Comparison:
    path = None
    if grid:
        path = out.parent / "grid.toml"
        path.write_text(grid)
    plan = Plan(read_grid(path, None, SETS, over, tune), out / "runs")
    plan.validate()
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160)
    return Comparison(plan, out, workers, console, job)


def printed(made: Comparison) -> str:
    return made.console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def traced(out: Path) -> list[str]:
    """Names of the runs, in the order in which they began."""
    return [line.split()[1] for line in (out / jobs.TRACE).read_text().splitlines()]


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))


def summaries(out: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (out / "runs").glob("*/summary.json")}


def test_all_combinations_run_and_a_second_call_runs_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = comparison(out, "strategy=la-lora,dp-lora", "privacy.epsilon=2,inf", "seed=0,1", workers=2)
    text = first.run()
    assert len(traced(out)) == 8 and (out / "results.md").read_text() == text
    for row in rows(out):
        values = flat(strategy=row["strategy"], privacy__epsilon=float(row["privacy.epsilon"]), seed=int(row["seed"]))
        assert float(row["accuracy"]) == accuracy_for({**values, "train.lr": float(row["train.lr"])})
        assert json.loads((out / row["run"] / "summary.json").read_text())["accuracy"] == float(row["accuracy"])
    assert printed(first).count("accuracy") == 8 and printed(first).count("[8/8] running: ") == 1
    assert printed(first).count("dp-lora, non-private, seed 1: ") == 1
    assert (out / "plots" / "accuracy-by-epsilon.png").read_bytes()[:4] == b"\x89PNG"
    before = summaries(out)
    again = comparison(out, "strategy=la-lora,dp-lora", "privacy.epsilon=2,inf", "seed=0,1")
    assert again.run() == text
    assert len(traced(out)) == 8 and summaries(out) == before and printed(again) == ""


def test_tuning_runs_of_the_same_settings_serve_as_final_runs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    comparison(out, "strategy=la-lora,ffa-lora", "seed=0,1", tune=("train.lr=0.1,0.3,1.0",), workers=2).run()
    assert len(traced(out)) == 12  # 2 methods x 2 seeds x 3 rates, and none for stage 2
    stages = {(row["method"], float(row["train.lr"])): row["stage"] for row in rows(out)}
    assert stages["la-lora", 0.3] == stages["ffa-lora", 1.0] == "tuning+final"
    assert list(stages.values()).count("tuning") == 4 and len(rows(out)) == 12


def test_other_tuning_seeds_and_keys_are_runs_of_their_own(tmp_path: Path) -> None:
    grid = "[tune]\ntrain.lr=[0.1,0.3]\n[tuning]\nseed=[100]\nset={privacy.delta=1e-5}"
    made = comparison(tmp_path / "out", "strategy=la-lora", "seed=0,1", grid=grid)
    made.run()
    found = [(row["stage"], row["seed"], row["train.lr"], row["privacy.delta"]) for row in rows(tmp_path / "out")]
    assert found == [
        ("tuning", "100", "0.1", "1e-05"),
        ("tuning", "100", "0.3", "1e-05"),
        ("final", "0", "0.3", "0.0001"),
        ("final", "1", "0.3", "0.0001"),
    ]
    assert "[4/4] final" in printed(made)


def test_a_failed_tuning_run_loses_and_is_no_failure(tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = comparison(out, "strategy=ffa-lora", tune=("train.lr=0.1,0.3,1.0,2.0",), job=jobs.fail_high_lr).run()
    assert "(lr 0.3)" in text and text.count("failed |") == 2
    assert {row["train.lr"]: row["failure"] for row in rows(out)} == {
        "0.1": "",
        "0.3": "",
        "1.0": "diverged",
        "2.0": "unexpected ValueError: first line second line",
    }


def test_tuning_without_any_finished_value_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="no tuned value works for 1 of 1 combinations, the first: diverged"):
        comparison(tmp_path / "out", "strategy=ffa-lora", tune=("train.lr=1.0,2.0",), job=jobs.fail_high_lr).run()


def test_a_failed_run_is_told_the_rest_goes_on_and_the_next_call_repeats_it_alone(tmp_path: Path) -> None:
    out, over = tmp_path / "out", "seed=0,1,2"
    made = comparison(out, over, job=jobs.fail_seed_1)
    with pytest.raises(RunFailed, match=r"1 of 3 runs failed, the first with: round 1: diverged"):
        made.run()
    assert len(summaries(out)) == 2 and "seed 1: failed: round 1: diverged" in printed(made)
    assert [row["failure"] for row in rows(out)] == ["", "round 1: diverged", ""]
    assert ", 2 of 3 runs" in (out / "results.md").read_text()
    before = summaries(out)
    comparison(out, over).run()
    assert len(traced(out)) == 3 and before.items() <= summaries(out).items()
    assert not list(out.rglob("failure.json"))


def test_a_worker_that_dies_is_one_line_and_the_next_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, over = tmp_path / "out", "seed=0,1,2"
    made = comparison(out, over, job=jobs.die_at_seed_1)
    monkeypatch.setenv("LALORA_TEST_DIE", "1")
    with pytest.raises(RunFailed) as caught:
        made.run()
    monkeypatch.delenv("LALORA_TEST_DIE")
    assert "a worker died (exit code 7) in la-lora-eps3-seed1-" in str(caught.value) and "\n" not in str(caught.value)
    (half,) = (path.parent for path in (out / "runs").glob("*/metrics.jsonl") if not (path.parent / "summary.json").exists())
    (half / "left-over").touch()
    before = summaries(out)
    comparison(out, over, job=jobs.die_at_seed_1).run()
    assert len(summaries(out)) == 3 and before.items() <= summaries(out).items()
    assert len((half / "metrics.jsonl").read_text().splitlines()) == 4 and not (half / "left-over").exists()


def test_ctrl_c_ends_the_workers(tmp_path: Path) -> None:
    made = comparison(tmp_path / "out", "seed=0,1", job=jobs.interrupt_parent, workers=2)
    with pytest.raises(KeyboardInterrupt):
        made.run()
    children = [int(pid) for pid in (tmp_path / "out" / jobs.TRACE).read_text().split()]
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    assert (tmp_path / "out" / "workers.log").read_text() == ""  # no traceback: a worker does not see Ctrl-C


def test_a_worker_takes_many_cells_and_changes_model_as_seldom_as_it_can(tmp_path: Path) -> None:
    out = tmp_path / "out"
    comparison(out, "seed=0,1,2", "model.dtype=float32,bfloat16", "strategy=la-lora,dp-lora", workers=2).run()
    by_process: dict[str, list[str]] = {}
    for line in (out / jobs.TRACE).read_text().splitlines():
        pid, name, _ = line.split()
        by_process.setdefault(pid, []).append(
            (out / "runs" / name / "config.toml").read_text().split('dtype = "')[1].split('"')[0]
        )
    assert len(by_process) <= 2
    first = [types[0] for types in by_process.values()]
    assert len(first) == 1 or sorted(first) == ["bfloat16", "float32"]  # each worker loads its own model first
    for types in by_process.values():
        assert sum(a != b for a, b in itertools.pairwise(types)) <= 1


def test_another_comparison_in_the_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    comparison(out, "seed=0").run()
    before = summaries(out)
    for over in (("seed=0,1",), ("seed=0", "strategy=la-lora")):
        with pytest.raises(ConfigError, match="holds another comparison"):
            comparison(out, *over).run()
    assert summaries(out) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(ConfigError, match="holds something else"):
        comparison(tmp_path / "full", "seed=0").run()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--out"):
        comparison(tmp_path / "file", "seed=0").run()
    (out / "comparison.json").write_text("{}")
    with pytest.raises(ConfigError, match="is damaged"):
        comparison(out, "seed=0").run()


def test_two_commands_in_one_folder_are_refused(tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(ConfigError, match="another lalora compare is at work there"):
        comparison(tmp_path / "out", "seed=0").run()


def test_a_terminal_shows_a_table_that_ends_complete(tmp_path: Path) -> None:
    made = comparison(tmp_path / "out", "strategy=la-lora,dp-lora", "seed=0,1", terminal=True)
    made.run()
    last = printed(made)
    assert "4 of 4 runs" in last and "2/2" in last and "[1/4]" not in last


@pytest.mark.parametrize(
    ("share", "gpus", "threads", "workers"), [(0.5, 2, 1, 4), (1.0, 2, 8, 2), (0.4, 1, 1, 2), (1.0, 0, 1, 1), (0.0, 0, 10**6, 1)]
)
def test_as_many_workers_as_the_machine_carries(share: float, gpus: int, threads: int, workers: int) -> None:
    assert default_workers(share, gpus, threads) == workers


def test_the_accuracy_without_privacy_is_labelled(tmp_path: Path) -> None:
    text = comparison(tmp_path / "out", f"privacy.epsilon={math.inf}").run()
    assert "non-private (ε = inf)" in text
