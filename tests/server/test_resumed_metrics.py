"""The metrics of a run that was killed: a checkpoint says how much of the file belongs to it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lalora_flwr.engines.inline import run_inline
from lalora_flwr.ground.errors import RunFailed
from lalora_flwr.server import folder as run_folder
from tests.conftest import small
from tests.server.test_resume import MakeFinished, killed_after, result, resumed


@pytest.mark.parametrize("beyond", [b'{"round": 3, "epsilon": 1.0}\n', b'{"rou', b""])
def test_what_was_written_after_the_last_checkpoint_is_cut_off(beyond: bytes, tmp_path: Path, finished: MakeFinished) -> None:
    killed_after(small(tmp_path, num_rounds=3), 2)
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(beyond)
    assert result(run_inline(resumed(tmp_path, num_rounds=3))) == result(finished(num_rounds=3).path)


def test_metrics_of_a_run_that_died_before_its_first_checkpoint_are_dropped(tmp_path: Path, finished: MakeFinished) -> None:
    killed_after(small(tmp_path, num_rounds=3), 1)
    (tmp_path / "run" / "checkpoint" / "adapter.safetensors").unlink()
    assert result(run_inline(resumed(tmp_path, num_rounds=3))) == result(finished(num_rounds=3).path)


def test_a_checkpoint_that_holds_the_metrics_itself_is_resumed(tmp_path: Path, finished: MakeFinished) -> None:
    """As versions before this one wrote it."""
    killed_after(small(tmp_path, num_rounds=3), 2)
    folder, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    checkpoint = run_folder.read_checkpoint(folder)
    assert checkpoint is not None and "metrics" not in checkpoint.state
    state = {**checkpoint.state, "metrics": [json.loads(line) for line in metrics.read_text().splitlines()]}
    del state["metrics_size"]
    with run_folder.RunFolder(resumed(tmp_path, num_rounds=3)) as again:
        again.save_checkpoint(replace(checkpoint, state=state))
    metrics.unlink()
    assert result(run_inline(resumed(tmp_path, num_rounds=3))) == result(finished(num_rounds=3).path)


@pytest.mark.parametrize("left", [0, 40])
def test_a_run_whose_metrics_are_gone_says_so(left: int, tmp_path: Path) -> None:
    killed_after(small(tmp_path, num_rounds=3), 2)
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(RunFailed, match=r"metrics\.jsonl is damaged \(.*\); the run cannot go on without it") as said:
        run_inline(resumed(tmp_path, num_rounds=3))
    assert "\n" not in str(said.value)
