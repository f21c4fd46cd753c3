"""``lalora diagnose`` on runs of the inline engine, and on what is no such run."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lalora_flwr.diagnose.diagnosis import Effort, diagnose
from lalora_flwr.diagnose.figures import NAMES, figures
from lalora_flwr.diagnose.opened import opened
from lalora_flwr.diagnose.report import chosen, columns_of, named
from lalora_flwr.diagnose.table import Column, markdown
from tests.cli.commands import Lalora, assert_one_line
from tests.conftest import Finished, files_in, strict_json

MakeFinished = Callable[..., Finished]
QUICK = ("--records", "8", "--points", "3")
SECURE = {"strategy": "steady-lora", "trust": "secure-sum", "num_supernodes": 4, "fraction_train": 1.0, "train__local_steps": 1}


@pytest.fixture
def run(finished: MakeFinished, tmp_path: Path) -> Path:
    """A copy of a finished run that may be changed."""
    return Path(shutil.copytree(finished(strategy="dp-lora", num_rounds=1).path, tmp_path / "a-run"))


def diagnosis(folder: Path) -> list[dict[str, Any]]:
    return list(strict_json((folder / "diagnosis.json").read_text())["runs"])


def test_a_run_gets_a_table_a_file_and_pictures(run: Path, lalora: Lalora) -> None:
    before = files_in(run)
    code, out, err = lalora("diagnose", str(run), *QUICK)
    assert (code, err) == (0, "")
    for words in (
        "signal-to-noise of the mean update",
        "aggregation bias",
        "largest Hessian eigenvalue, merged weights",
        "‖N_B N_A‖",
    ):
        assert words in out
    found = diagnosis(run)
    assert found[0]["strategy"] == "dp-lora" and found[0]["records"] == 8 and found[0]["merged"]["products"] > 1
    assert found[0]["released"]["cosine_A"] is not None and found[0]["amplification"]["whole"]["product"]["step"] > 0
    assert found[0]["score"] == json.loads(before["summary.json"])["accuracy"]
    new = {name: content for name, content in files_in(run).items() if name not in before}
    assert set(new) == {"diagnosis.json", *(f"plots/{name}.{kind}" for name in NAMES for kind in ("png", "svg", "pdf"))}


def test_several_runs_are_columns_of_one_folder(finished: MakeFinished, run: Path, lalora: Lalora, tmp_path: Path) -> None:
    other = finished(**SECURE).path
    untouched = files_in(run)
    code, out, _ = lalora("diagnose", str(run), str(other), *QUICK, "--points", "0", "--out", "both")
    assert code == 0 and "single updates: hidden by secure-sum" in out and files_in(run) == untouched
    first, second = diagnosis(tmp_path / "both")
    assert first["column"] != second["column"] and second["released"]["cosine_B"] is None
    assert second["released"]["snr"] is not None and second["landscape"] is None
    names = {Path(name).stem for name in files_in(tmp_path / "both" / "plots")}
    assert names == {"diagnosis-updates", "diagnosis-noise", "diagnosis-sharpness"}


def test_a_run_of_an_older_version_gets_all_but_what_it_lacks(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    new = ("snr", "snr_A", "snr_B", "cosine_A", "cosine_B", "coupling", "cross_term", "aggregation_bias", "peak_memory_mb")
    for line in lines:
        for name in new:
            line.pop(name, None)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = diagnose(opened(run), Effort(8, 0))
    assert "as one of an older version" in markdown([Column("old", (found,))])
    assert found.adapter.value and (found.cost.peak_memory_mb or 0) > 100 and found.released.snr is None
    assert "diagnosis-updates" not in dict(figures([Column("old", (found,))]))


def test_runs_of_several_seeds_share_a_column_if_that_is_wanted(finished: MakeFinished) -> None:
    paths = [finished(strategy="dp-lora", num_rounds=1, **more).path for more in ({}, {"seed": 1})]
    results, _ = chosen(paths)
    assert list(named(results, over_seeds=False)) == ["dp-lora, seed 0", "dp-lora, seed 1"]
    names = named(results, over_seeds=True)
    found = {path: diagnose(opened(path), Effort(8, 0)) for path in paths}
    (column,) = columns_of(names, found)
    assert column.name == "dp-lora" and set(column.values(lambda run: run.loss)) == {run.loss for run in found.values()}
    row = next(line for line in markdown([column]).splitlines() if line.startswith("| public loss"))
    losses = [run.loss or 0.0 for run in found.values()]
    assert f"{statistics.fmean(losses):.3g} ± {statistics.stdev(losses):.2g}" in row


def test_no_run_is_one_line(lalora: Lalora, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        assert_one_line(lalora("diagnose", name), f"{name}: no run folder")
    assert not files_in(tmp_path)


def test_a_place_that_cannot_be_written_is_told_before_any_run_is_read(lalora: Lalora, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    assert_one_line(lalora("diagnose", "missing", "--out", "taken"), "--out taken: cannot be written")


def test_an_unfinished_run_is_one_line(run: Path, lalora: Lalora) -> None:
    (run / "summary.json").unlink()
    assert_one_line(lalora("diagnose", str(run)), "whose process was killed", code=1)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("checkpoint/adapter.safetensors", b"damaged", "adapter.safetensors is damaged"),
        ("checkpoint/adapter.safetensors", None, "its checkpoint is missing"),
        ("metrics.jsonl", b"{", "not a finished run"),
        ("metrics.jsonl", b"", "metrics.jsonl is empty"),
        ("metrics.jsonl", b'{"round": 1, "sites": {}}', "sites: {} is not a value of it"),
        ("metrics.jsonl", b'{"round": 1, "bytes_up": 1' + 400 * b"0" + b"}", "bytes_up: 1"),
        ("summary.json", b"[]", "not a finished run"),
        ("config.toml", b"a = ", "not valid TOML"),
        ("config.toml", b"[lora]\nrank = 3\n", "config.toml lacks"),
    ],
)
def test_a_damaged_file_is_one_line(name: str, content: bytes | None, said: str, run: Path, lalora: Lalora) -> None:
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content)
    assert_one_line(lalora("diagnose", str(run)), said)
    assert "diagnosis.json" not in files_in(run)


def test_a_checkpoint_of_another_adapter_is_one_line(run: Path, lalora: Lalora) -> None:
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(re.sub(r"^rank = \d+", "rank = 3", config, flags=re.MULTILINE))
    assert_one_line(lalora("diagnose", str(run)), "not of the adapter that its config.toml makes")


@pytest.mark.parametrize("option", [("--records", "0"), ("--points", "4"), ("--points", "1")])
def test_an_effort_that_cannot_be_made_is_one_line(option: tuple[str, str], run: Path, lalora: Lalora) -> None:
    assert_one_line(lalora("diagnose", str(run), *option), " ".join(option))
