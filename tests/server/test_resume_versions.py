"""A run goes on as the run that it was, whatever version of this package began it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lalora_flwr.engines.inline import run_inline
from lalora_flwr.ground.errors import ConfigError
from tests.conftest import small
from tests.server.test_resume import killed_after, resumed


def rewrite(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Change the state and the tensors of a run's checkpoint."""
    path = folder / "run" / "checkpoint" / "adapter.safetensors"
    with safe_open(path, "pt") as file:
        about = file.metadata()
    state, tensors = json.loads(about["state"]), load_file(path)
    change(state, tensors)
    save_file(tensors, path, {**about, "state": json.dumps(state)})


ONE_STEP = {"train__local_steps": 1, "num_rounds": 3}


@pytest.mark.parametrize(("schedule", "was"), [("auto", "step:BA"), ("step:BBA", "step:BBA")])
def test_a_run_of_a_version_whose_schedule_was_another_is_refused(schedule: str, was: str, tmp_path: Path) -> None:
    """Before schedules by step advanced by round, LA-LoRA with one local step trained B alone."""
    settings = {**ONE_STEP, "lora__schedule": schedule}
    killed_after(small(tmp_path, **settings), 1)
    rewrite(tmp_path, lambda state, _: state.pop("choices"))
    now = was.replace("step", "round")
    with pytest.raises(ConfigError, match=rf"^lora.schedule = '{schedule}': was '{was}' when the run began and is '{now}' now; "):
        run_inline(resumed(tmp_path, **settings))


@pytest.mark.parametrize(
    "settings", [{"num_rounds": 2}, {**ONE_STEP, "strategy": "ffa-lora"}, {**ONE_STEP, "strategy": "rolora"}]
)
def test_a_run_of_an_older_version_that_means_the_same_goes_on(settings: dict[str, Any], tmp_path: Path) -> None:
    killed_after(small(tmp_path, **settings), 1)
    rewrite(tmp_path, lambda state, _: state.pop("choices"))
    assert run_inline(resumed(tmp_path, **settings))


def test_what_auto_comes_to_and_the_shape_of_the_adapter_stay(tmp_path: Path) -> None:
    killed_after(small(tmp_path), 1)
    rewrite(tmp_path, lambda state, _: state["choices"].update({"merge.average": "ema"}))
    with pytest.raises(ConfigError, match=r"^merge\.average = 'auto': was 'ema' when the run began and is 'last' now"):
        run_inline(resumed(tmp_path))

    def narrower(state: dict[str, Any], tensors: dict[str, Any]) -> None:
        state["choices"]["merge.average"] = "last"
        name = min(tensors)
        tensors[name] = tensors[name][:1].clone()

    rewrite(tmp_path, narrower)
    with pytest.raises(ConfigError, match=r"^strategy = 'la-lora': the run to resume has an adapter of other tensors"):
        run_inline(resumed(tmp_path))
