"""What a run writes: files, labels, the adapter; the same bytes for the same seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lalora_flwr.data.digits import test_part as public_test_part
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.embedded import build_vit_digits
from lalora_flwr.server.metrics import RoundMetrics
from tests.conftest import (
    Finished,
    Spy,
    files_in,
    run_spied,
    small,
    strict_json,
)
from tests.server.federations import failing, stopped
from tests.sites import servers_learner

METRICS = {"round", "accuracy", "loss", "epsilon", "sites", "failures", "seconds", "bytes_up", "bytes_down"}


SUMMARY = {
    *("strategy", "model", "data", "seed", "rounds", "accuracy", "epsilon", "delta", "noise_multiplier", "sample_rate"),
    *("clip_norm", "accountant", "private", "seeded", "seconds", "peak_memory_mb", "versions"),
}


def test_without_privacy_everything_says_so(finished: Callable[..., Finished]) -> None:
    run = finished(privacy__epsilon=math.inf)
    assert run.summary["private"] is False and run.summary["epsilon"] is None and run.summary["noise_multiplier"] == 0
    assert [(line["private"], line["epsilon"]) for line in run.metrics] == [(False, None)] * 2
    assert "epsilon = inf" in (run.path / "config.toml").read_text()


def test_with_privacy_everything_says_so(finished: Callable[..., Finished]) -> None:
    run = finished()
    assert run.summary["private"] is True and all(line["private"] is True for line in run.metrics)


def test_a_run_says_everywhere_that_it_is_seeded(finished: Callable[..., Finished]) -> None:
    run = finished()
    assert run.summary["seeded"] is True and all(s["seeded"] is True for s in run.summary["sites"].values())
    assert all(line["seeded"] is True for line in run.metrics)


@pytest.mark.parametrize("overrides", [{}, {"privacy__epsilon": math.inf}], ids=["private", "non-private"])
def test_the_files_hold_what_other_tools_rely_on(overrides: dict[str, Any], finished: Callable[..., Finished]) -> None:
    run = finished(**overrides)
    assert set(run.summary) >= SUMMARY
    assert all(set(line) >= METRICS for line in run.metrics)
    assert [line["round"] for line in run.metrics] == [1, 2]
    assert (run.summary["strategy"], run.summary["seed"], run.summary["rounds"]) == ("la-lora", 0, 2)
    assert run.summary["accuracy"] == run.metrics[-1]["accuracy"]
    assert run.summary["versions"]["flwr"].startswith("1.41.")
    assert run.summary["peak_memory_mb"] > 100
    assert set(files_in(run.path)) >= {
        "config.toml",
        "metrics.jsonl",
        "summary.json",
        "checkpoint/adapter.safetensors",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        *("plots/accuracy.png", "plots/accuracy.svg", "plots/accuracy.pdf"),
        "flower.log",
    }
    assert (run.path / "plots" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert not [name for name in files_in(run.path) if ".part" in name]


def results(run: Finished) -> tuple[bytes, list[dict[str, Any]]]:
    lines = [{key: value for key, value in line.items() if key not in ("seconds", "peak_memory_mb")} for line in run.metrics]
    return (run.path / "adapter" / "adapter_model.safetensors").read_bytes(), lines


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path, finished: Callable[..., Finished]) -> None:
    settings, spy = small(tmp_path), Spy()
    first, again = finished(), Finished(run_spied(settings, spy), settings, spy)
    assert results(first) == results(again)
    other = finished(seed=1)
    assert results(other)[0] != results(first)[0]


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(tmp_path: Path, finished: Callable[..., Finished]) -> None:
    settings = small(tmp_path, num_rounds=1)
    run_spied(settings, Spy())
    before, spy = files_in(tmp_path), Spy()
    with pytest.raises(ConfigError, match=r"run-name = 'run': .* holds a run already"):
        run_spied(small(tmp_path, num_rounds=1, seed=5), spy)
    assert files_in(tmp_path) == before and not spy.exchange


def test_a_folder_that_holds_a_failed_run_is_refused_too(tmp_path: Path) -> None:
    stopped(small(tmp_path), Spy(failing(0, 1, 2)))
    before = files_in(tmp_path)
    with pytest.raises(ConfigError, match="holds a run already"):
        run_spied(small(tmp_path), Spy())
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("strategy", ["la-lora", "ffa-lora"])
def test_peft_loads_the_adapter_of_a_run_and_gets_its_accuracy(
    strategy: str, head: str, finished: Callable[..., Finished]
) -> None:
    run = finished(strategy=strategy, lora__head=head)
    images, labels = public_test_part()
    base = build_vit_digits()
    with torch.inference_mode():
        frozen = base(images)
        loaded = PeftModel.from_pretrained(base, str(run.path / "adapter")).eval()(images)
    model = servers_learner(run.settings).adapter.model
    values = {name: run.checkpoint.get(plain(name)) for name, _ in model.named_parameters()}
    assert len(run.checkpoint) == sum(value is not None for value in values.values())
    model.load_state_dict({name: value for name, value in values.items() if value is not None}, strict=False)
    with torch.inference_mode():
        checkpointed = model.eval()(images)
    torch.testing.assert_close(loaded, checkpointed, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(loaded, frozen, atol=1e-2)
    right = int((loaded.argmax(-1) == labels).sum())
    assert run.summary["accuracy"] == pytest.approx(right / len(labels), abs=1e-9)
    assert run.summary["frozen_accuracy"] == pytest.approx(float((frozen.argmax(-1) == labels).float().mean()), abs=1e-6)
    loss = float(torch.nn.functional.cross_entropy(loaded, labels))
    assert run.summary["loss"] == pytest.approx(loss, rel=1e-4)


def plain(name: str) -> str:
    """PEFT's name of a parameter in a file, from its name in the model."""
    return name.replace(".modules_to_save.default", "").replace(".default", "")


def test_the_adapter_folder_holds_the_checkpoint_and_the_settings(finished: Callable[..., Finished]) -> None:
    run = finished(lora__head="trained")
    config = strict_json((run.path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 4.0, ["attn.qkv"])
    saved = load_file(run.path / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == run.checkpoint.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in run.checkpoint.items())


def test_on_round_gets_each_line_as_it_is_written(tmp_path: Path) -> None:
    from lalora_flwr.engines.inline import run_inline

    told: list[RoundMetrics] = []

    def on_round(line: RoundMetrics) -> None:
        assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == line.round
        told.append(line)

    path = run_inline(small(tmp_path, privacy__epsilon=math.inf), on_round)
    written = [strict_json(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [{**line.to_json(), "epsilon": None} for line in told] == written
