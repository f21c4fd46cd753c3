"""What a run leaves on disk is whole, strict JSON, and never overwrites another run."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lalora_flwr.ground.errors import ConfigError, RunFailed
from lalora_flwr.server.folder import Checkpoint, RunFolder, to_json
from lalora_flwr.server.metrics import RoundMetrics, Summary
from lalora_flwr.server.versions import versions
from tests.conftest import files_in, small, strict_json


def test_json_has_no_constant_that_json_lacks() -> None:
    value = {"a": math.inf, "b": [math.nan, -math.inf, {"c": math.inf}], "d": (1.5, math.nan), "e": 1, "f": True, "g": None}
    assert strict_json(to_json(value)) == {
        "a": None,
        "b": [None, None, {"c": None}],
        "d": [1.5, None],
        "e": 1,
        "f": True,
        "g": None,
    }


def test_metrics_gain_one_strict_line_a_round(tmp_path: Path) -> None:
    folder = RunFolder(small(tmp_path))
    for server_round in (1, 2):
        folder.add_metrics(RoundMetrics(round=server_round, epsilon=math.inf))
        lines = (folder.path / "metrics.jsonl").read_text().splitlines()
        said = [strict_json(line) for line in lines]
        assert [(line["round"], line["epsilon"]) for line in said] == [(r, None) for r in range(1, server_round + 1)]


def test_a_checkpoint_is_one_file_that_names_its_round(tmp_path: Path) -> None:
    folder = RunFolder(small(tmp_path))
    assert folder.load_checkpoint() is None
    for server_round in (1, 2):
        state = {"epsilon": math.inf, "text": "ε", "number": 0.1}
        folder.save_checkpoint(Checkpoint(server_round, {"a": torch.full((2,), float(server_round))}, state))
    assert [path.name for path in (folder.path / "checkpoint").iterdir()] == ["adapter.safetensors"]
    with safe_open(folder.path / "checkpoint" / "adapter.safetensors", "pt") as checkpoint:
        assert checkpoint.metadata()["round"] == "2"
    read = folder.load_checkpoint()
    assert read is not None and read.server_round == 2 and read.state == state
    assert torch.equal(read.adapter["a"], torch.full((2,), 2.0))


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    RunFolder(small(tmp_path)).finish(Summary(quality={"accuracy": 0.5}))
    before = files_in(tmp_path)
    with pytest.raises(ConfigError, match=r"run-name = 'run': .* holds a run already, .*; choose another name") as refusal:
        RunFolder(small(tmp_path, seed=1))
    assert "\n" not in str(refusal.value) and files_in(tmp_path) == before


def test_an_output_dir_that_cannot_be_made_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="output-dir = ") as refusal:
        RunFolder(small(tmp_path / "file"))
    assert "\n" not in str(refusal.value)


def test_a_failure_is_one_strict_line(tmp_path: Path) -> None:
    folder = RunFolder(small(tmp_path))
    folder.fail('site 1: "quoted"')
    text = (folder.path / "failure.json").read_text()
    assert json.loads(text) == {"error": 'site 1: "quoted"'} and text.count("\n") == 1


def test_versions_name_the_packages_that_shape_a_result() -> None:
    found = versions()
    assert found["flwr"].startswith("1.41.") and set(found) >= {"lalora-flwr", "torch", "peft", "opacus", "timm"}
    assert "not installed" not in found.values()


def test_a_folder_says_what_became_of_its_run(tmp_path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(ConfigError, match="holds a run already") as caught:
            RunFolder(small(tmp_path))
        return str(caught.value)

    with RunFolder(small(tmp_path)) as folder:
        assert "whose process still runs; choose another name, or go on with it by lalora run --resume" in refusal()
    assert "whose process was killed; choose another name, or go on" in refusal()
    folder.fail("round 1: too many failures")
    assert "which stopped (round 1: too many failures); choose another name, or go on" in refusal()
    (folder.path / "failure.json").write_text("[]")
    assert "which stopped (failure.json cannot be read)" in refusal()
    folder.finish(Summary())
    assert refusal().endswith("which is finished; choose another name")


def test_the_command_to_go_on_can_be_copied_into_a_shell(tmp_path: Path) -> None:
    with RunFolder(small(tmp_path / "two words")) as folder:
        pass
    with pytest.raises(ConfigError, match="holds a run already") as caught:
        RunFolder(small(tmp_path / "two words"))
    assert shlex.split(str(caught.value).partition("lalora run ")[2]) == ["--resume", str(folder.path)]


def test_how_often_sites_were_asked_survives_and_damage_is_said(tmp_path: Path) -> None:
    with RunFolder(small(tmp_path)) as folder:
        assert folder.load_asked() == {}
        folder.save_asked(asked := {"7": {"rounds": 3, "evaluations": 1}})
        assert folder.load_asked() == asked
        for damage in ("", "[]", '{"7": 3}', '{"7": {"rounds": 3}}', '{"7": {"rounds": "x", "evaluations": 0}}'):
            (folder.path / "checkpoint" / "asked.json").write_text(damage)
            with pytest.raises(RunFailed, match="is damaged"):
                folder.load_asked()
