"""Whole tiny federated runs of every task, on small files, with tiny models and a finite ε."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest

from lalora_flwr.ground.errors import LaloraError
from lalora_flwr.server.metrics import HEADLINE_OF
from lalora_flwr.settings import Settings
from tests.conftest import Finished, Spy, run_spied, small
from tests.models.files import ANSWER, pairs, save_rows, scored, sums, texts
from tests.models.folders import TIMM, save_found, save_hf, save_images, save_timm

RUN: dict[str, Any] = {
    "num_rounds": 2,
    "num_supernodes": 2,
    "train__batch_size": 12,
    "lora__targets": "auto",
    "data__max_tokens": 24,
    "data__min_records": 1,
    "privacy__accountant": "rdp",  # calibrates in no time
}


def text(folder: Path) -> dict[str, Any]:
    save_hf(folder / "model", "bert", "base")
    return {
        "model__name": f"hf/{folder / 'model'}",
        "data__name": save_rows(folder / "train.jsonl", texts(60)),
        "data__test": save_rows(folder / "test.jsonl", texts(21, seed=5)),
        "lora__head": "trained",
    }


def text_pair(folder: Path) -> dict[str, Any]:
    save_hf(folder / "model", "roberta", "base")
    return {
        "model__name": f"hf/{folder / 'model'}",
        "data__name": save_rows(folder / "train.jsonl", pairs(60)),
        "data__test": "hold-out:0.2",
        "data__text": "first",
        "data__text_pair": "second",
        "lora__head": "trained",
        "train__optimizer": "adamw",
        "train__lr": 0.01,
    }


def language(folder: Path) -> dict[str, Any]:
    save_hf(folder / "model", "llama", "causal")
    return {
        "model__name": f"hf/{folder / 'model'}",
        "data__name": save_rows(folder / "train.jsonl", sums(40)),
        "data__test": save_rows(folder / "test.jsonl", sums(6)),
        "data__text": "prompt",
        "data__text_pair": "more",
        "data__response": "response",
        "data__answer": ANSWER,
        "train__gradient_checkpointing": True,
        "train__max_physical_batch": 4,
    }


def image(folder: Path, family: str) -> dict[str, Any]:
    save_timm(folder / "model", family)
    save_images(folder / "images", ("red", "green", "blue"), 16)
    return {
        "model__name": f"timm/{folder / 'model'}",
        "data__name": f"file:{folder / 'images'}",
        "lora__head": "trained",
        "data__partition": "dirichlet",
    }


SEVERAL = {"data__problem_type": "multi-label"}
NUMBERS = {"data__problem_type": "regression"}


def found(folder: Path, **more: Any) -> dict[str, Any]:
    save_timm(folder / "model", "swin")
    data = {"data__name": save_found(folder / "found", 60), "data__test": "hold-out:0.3"}
    return {"model__name": f"timm/{folder / 'model'}", **data, **more}


def scored_text(folder: Path, **more: Any) -> dict[str, Any]:
    save_hf(folder / "model", "distilbert", "base")
    data = {"data__name": save_rows(folder / "train.jsonl", scored(60)), "data__test": "hold-out:0.3"}
    return {"model__name": f"hf/{folder / 'model'}", **data, **more}


TASKS: dict[str, Any] = {
    "several classes in pictures": lambda f: found(f, data__labels="red,green,blue", **SEVERAL),
    "several classes in texts": lambda f: scored_text(f, data__label="label", **SEVERAL),
    "numbers of pictures": lambda f: found(
        f, data__label="colours", data__label_range="0,3", data__partition="shards", **NUMBERS
    ),
    "numbers of texts": lambda f: scored_text(f, data__label="score", data__label_range="0,10", **NUMBERS),
    "text": text,
    "text-pair": text_pair,
    "language": language,
    **{family: lambda folder, family=family: image(folder, family) for family in TIMM},
}
FILES = {
    "hf": {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"},
    "timm": {"model.safetensors", "config.json"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    made = {}
    for task, prepare in TASKS.items():
        folder = tmp_path_factory.mktemp(task)
        settings: Settings = small(folder, **{**RUN, **prepare(folder)})
        spy = Spy()
        made[task] = Finished(run_spied(settings, spy), settings, spy)
    return made


@pytest.mark.parametrize("task", TASKS)
def test_a_run_ends_with_sensible_metrics(runs: dict[str, Finished], task: str) -> None:
    run = runs[task]
    summary = run.summary
    assert summary["rounds"] == len(run.metrics) == 2 and summary["failures"] == 0
    headline = HEADLINE_OF[run.settings.data.problem_type]
    assert -math.inf < summary[headline] <= 1 and -math.inf < summary[f"frozen_{headline}"] <= 1
    assert summary[headline] >= 0 or headline == "r2"
    assert [line[headline] is not None for line in run.metrics] == [True, True]
    assert math.isfinite(summary["loss"]) and summary["loss"] > 0
    assert summary["private"] and 0 < summary["epsilon"] <= run.settings.privacy.epsilon
    assert [line["sites"] for line in run.metrics] == [2, 2]
    if task == "language":
        assert "f1" not in summary and summary["exact_match"] == summary["accuracy"]
        assert summary["accuracy"] * 5 == pytest.approx(round(summary["accuracy"] * 5))  # of six responses five have an answer
    elif headline == "r2":
        assert summary["rmse"] >= summary["mae"] > 0 and not summary["labels"] and "accuracy" not in summary
    else:
        assert 0 <= summary["f1"] <= 1 and ("matthews" in summary) == (headline == "accuracy")


@pytest.mark.parametrize("task", TASKS)
def test_training_moves_the_adapter_and_what_the_model_says(runs: dict[str, Finished], task: str) -> None:
    run = runs[task]
    moved = {name for name, tensor in run.checkpoint.items() if "lora_B" in name and bool(tensor.any())}
    assert moved == {name for name in run.checkpoint if "lora_B" in name} and moved
    assert run.metrics[0]["loss"] != run.metrics[1]["loss"]


@pytest.mark.parametrize("task", TASKS)
def test_the_summary_says_which_weights_these_were(runs: dict[str, Finished], task: str) -> None:
    run = runs[task]
    family, _, folder = run.settings.model.name.partition("/")
    summary = run.summary
    assert summary["model_revision"] == "" and len(summary["model_digest"]) == 64
    assert FILES[family] <= set(summary["model_files"])
    for name, found in summary["model_files"].items():
        assert found == hashlib.sha256((Path(folder) / name).read_bytes()).hexdigest(), name


@pytest.mark.parametrize(("about", "values"), [("numbers", [3.0]), ("classes", [[]]), ("classes", [["good"]])], ids=str)
def test_test_records_that_cannot_tell_models_apart_are_refused_before_a_step(
    about: str, values: list[Any], tmp_path: Path
) -> None:
    key, kind = ("score", NUMBERS) if about == "numbers" else ("label", SEVERAL)
    test = [{**row, key: values[i % len(values)]} for i, row in enumerate(scored(12))]
    more = {f"data__{key}": value for key, value in {"label": key, "test": save_rows(tmp_path / "same.jsonl", test)}.items()}
    more |= {"data__label_range": "0,10"} if about == "numbers" else {"data__labels": "good,long"}
    settings = small(tmp_path, **{**RUN, **scored_text(tmp_path, **kind), **more})
    with pytest.raises(LaloraError, match=r"^data\.test: (R²|AUROC) is not defined on the test records, which all have the same"):
        run_spied(settings, spy := Spy())
    assert not spy.training(1)


def test_it_learns_several_classes_and_numbers(tmp_path: Path) -> None:
    easy = {"privacy__epsilon": math.inf, "train__optimizer": "adamw", "train__lr": 0.03, "train__local_steps": 16}
    easy |= {"strategy": "dp-lora", "num_rounds": 3, "privacy__delta": 1e-3}
    several, numbers = tmp_path / "several", tmp_path / "numbers"
    several.mkdir()
    numbers.mkdir()
    settings = small(several, **{**RUN, **found(several, data__labels="red,green,blue", **SEVERAL), **easy})
    summary = Finished(run_spied(settings, spy := Spy()), settings, spy).summary
    assert summary["auroc"] >= 0.9 and summary["f1"] >= 0.8 and summary["labels"] == ["red", "green", "blue"]
    about = found(numbers, data__label="colours", data__label_range="0,3", **NUMBERS)
    settings = small(numbers, **{**RUN, **about, **easy})
    summary = Finished(run_spied(settings, spy := Spy()), settings, spy).summary
    assert summary["r2"] >= 0.5 and summary["pearson"] >= 0.75 and summary["mae"] <= 0.6


def test_with_little_noise_it_learns(tmp_path: Path) -> None:
    easy = {"privacy__epsilon": 100.0, "train__optimizer": "adamw", "train__lr": 0.03, "train__local_steps": 12}
    settings = small(tmp_path, **{**RUN, **image(tmp_path, "swin"), **easy, "data__partition": "iid", "strategy": "dp-lora"})
    spy = Spy()
    summary = Finished(run_spied(settings, spy), settings, spy).summary
    assert summary["accuracy"] >= 0.9 and summary["f1"] >= 0.85 and summary["matthews"] >= 0.8
