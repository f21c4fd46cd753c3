"""The operator's file: what a run has done, in Prometheus' form."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from lalora_flwr.ground.prometheus import Samples, samples_of
from lalora_flwr.server.metrics import RoundMetrics
from lalora_flwr.server.monitoring import MetricsFile
from tests.conftest import Spy, run_spied, small, strict_json
from tests.server.federations import failing


def read(path: Path) -> Samples:
    return samples_of(path.read_text())


def values(path: Path, name: str) -> dict[str, float]:
    """The values of a name, by the value of their last label."""
    return {of[-1][1]: value for (found, of), value in read(path).items() if found == name}


def test_a_runs_file_says_what_its_folder_says(tmp_path: Path) -> None:
    path = tmp_path / "a" / "run.prom"
    path.parent.mkdir()
    folder = run_spied(small(tmp_path, metrics_file=str(path)), Spy(failing(1, rounds=[1])))
    lines = [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    expected = {
        "lalora_run_rounds_wanted": 2,
        "lalora_run_rounds_total": 2,
        "lalora_run_epsilon_spent": lines[-1]["epsilon"],
        "lalora_run_epsilon_left": 4.0 - lines[-1]["epsilon"],
        "lalora_run_sites": 3,
        "lalora_run_seconds_total": pytest.approx(sum(line["seconds"] for line in lines), abs=1e-3),
        "lalora_run_score": lines[-1]["accuracy"],
    }
    assert {name: values(path, name)["run"] for name in expected} == expected
    assert values(path, "lalora_run_state") == {"finished": 1}
    assert sum(values(path, "lalora_run_refusals_total").values()) == 1
    assert set(values(path, "lalora_run_site_last_contact_timestamp_seconds")) == {"0", "1", "2"}
    assert not [one for one in path.parent.iterdir() if one != path]


def file_of(path: Path, **overrides: Any) -> MetricsFile:
    return MetricsFile(small(path.parent, metrics_file=str(path), **overrides), clock=lambda: 1000.0)


def test_what_sites_say_makes_no_label(tmp_path: Path) -> None:
    path = tmp_path / "run.prom"
    reasons = ["cap: the site does not allow this strategy", "cap: x", f"patient{'x' * 300}: y", "no colon", "budget"]
    failed = {str(site): reason for site, reason in enumerate(reasons)}
    file_of(path).add([RoundMetrics(round=1, failed_sites=failed, left_sites=["7", "8"])], served=[9])
    assert values(path, "lalora_run_refusals_total") == {"budget": 2, "cap": 2, "other": 3}
    assert values(path, "lalora_run_site_last_contact_timestamp_seconds") == {"9": 1000.0}
    assert "patient" not in path.read_text()


def test_a_run_without_privacy_has_no_epsilon(tmp_path: Path) -> None:
    path = tmp_path / "run.prom"
    file_of(path, privacy__epsilon=float("inf")).add([RoundMetrics(round=1)])
    assert not [name for name, _ in read(path) if "epsilon" in name]


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    path = tmp_path / "run.prom"
    lines = [RoundMetrics(round=number, seconds=2.0, failed_sites={"1": "data: x"}) for number in (1, 2)]
    file_of(path).add(lines)
    again = file_of(path)
    again.add(lines)
    again.add([RoundMetrics(round=3, seconds=1.0)])
    assert values(path, "lalora_run_seconds_total") == {"run": 5.0} and values(path, "lalora_run_refusals_total") == {"data": 2}


def test_a_file_that_cannot_be_written_costs_one_warning(tmp_path: Path) -> None:
    folder = run_spied(small(tmp_path, metrics_file=str(tmp_path / "gone" / "run.prom")), Spy())
    said = [line for line in (folder / "flower.log").read_text().splitlines() if "metrics-file" in line]
    assert len(said) == 1 and "No such file or directory" in said[0] and (folder / "summary.json").exists()


def test_a_folder_that_comes_back_is_written_to_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "late" / "run.prom"
    file = file_of(path)
    with caplog.at_level(logging.WARNING, "lalora_flwr.server"):
        file.write("running")
        file.write("running")
    assert caplog.text.count("cannot be written") == 1
    path.parent.mkdir()
    file.write("running")
    assert values(path, "lalora_run_state") == {"running": 1}
