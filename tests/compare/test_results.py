"""Reading runs and the CSV that holds them."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest

from lalora_flwr.compare.results import Result, csv_text, read_run
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.server.metrics import Summary
from tests.compare.made import failed, result, write_run


def test_the_csv_says_what_the_summaries_say(tmp_path: Path) -> None:
    found = []
    for name, overrides in {"a": {"seed": 0}, "b": {"seed": 1, "privacy__epsilon": math.inf, "lora__rank": 8}}.items():
        values, summary, metrics = read_run(write_run(tmp_path / "runs", name, **overrides))
        found.append(Result(tmp_path / "runs" / name, (("strategy", "la-lora"),), values, (), ("final",), summary, metrics))
    table = list(csv.DictReader(io.StringIO(csv_text(found, tmp_path))))
    assert len(table) == 2
    for row, name in zip(table, "ab", strict=True):
        summary = json.loads((tmp_path / "runs" / name / "summary.json").read_text())
        for key in ("accuracy", "loss", "f1", "frozen_accuracy", "noise_multiplier", "sample_rate", "seconds"):
            assert float(row[key]) == summary[key], key
        assert int(row["bytes_up"]) == summary["bytes_up"] and int(row["bytes_down"]) == summary["bytes_down"]
        assert row["epsilon"] == ("" if summary["epsilon"] is None else repr(summary["epsilon"]))
        assert (row["run"], row["stage"], row["failure"]) == (f"runs/{name}", "final", "")
    assert [row["privacy.epsilon"] for row in table] == ["3.0", "inf"]
    assert [row["lora.rank"] for row in table] == ["4", "8"]
    assert [row["seed"] for row in table] == ["0", "1"]
    assert not {"output-dir", "run-name", "num-rounds", "peak_memory_mb"} & set(table[0])


def test_a_failed_run_is_a_row_with_its_reason() -> None:
    row = list(csv.DictReader(io.StringIO(csv_text([result(), failed(seed=1)], Path()))))[1]
    assert row["failure"] == "diverged" and row["accuracy"] == "" and row["seed"] == "1"


@pytest.mark.parametrize("value", [None, math.nan])
def test_an_accuracy_that_is_no_number_is_none(value: float | None) -> None:
    assert Result(Path(), (), {}, summary=Summary(quality={"accuracy": value})).score is None


def test_a_damaged_run_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "a")
    (folder / "metrics.jsonl").write_text('{"round": ')
    with pytest.raises(ConfigError, match="not a finished run"):
        read_run(folder)
