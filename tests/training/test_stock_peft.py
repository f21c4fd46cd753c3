"""The adapter folder alone, with the published base model, gives the run's own model in stock PEFT: in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lalora_flwr.data.data_set import data_set
from lalora_flwr.server.folder import MORE
from lalora_flwr.training.learner import ModelStore
from tests.conftest import Finished, Spy, run_spied, small, strict_json
from tests.models.files import save_rows, scored, sums, texts
from tests.models.folders import save_found, save_hf, save_images, save_timm

RUN: dict[str, Any] = {
    "num_rounds": 1,
    "model__dtype": "float32",
    "num_supernodes": 2,
    "train__batch_size": 8,
    "train__lr": 2.0,
    "lora__targets": "auto",
    "data__max_tokens": 24,
    "data__min_records": 1,
    "privacy__epsilon": 100.0,
    "privacy__accountant": "rdp",
}
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # for blocks of four bits
COLOURS = ("red", "green", "blue")
Prepare = Callable[[Path], dict[str, Any]]


def image(family: str, classes: int, head: str) -> Prepare:
    def prepare(folder: Path) -> dict[str, Any]:
        save_timm(folder / "model", family, classes=classes)
        save_images(folder / "images", COLOURS, 16)
        return {"model__name": f"timm/{folder / 'model'}", "data__name": f"file:{folder / 'images'}", "lora__head": head}

    return prepare


def text(family: str, kind: str, head: str, *, wide: bool = False, **more: Any) -> Prepare:
    def prepare(folder: Path) -> dict[str, Any]:
        shape = {"num_labels": 2} if kind == "classifier" else {}
        save_hf(folder / "model", family, kind, **shape, **(WIDE if wide else {}))
        data = {"data__name": save_rows(folder / "train.jsonl", texts(40)), "data__test": "hold-out:0.3"}
        return {"model__name": f"hf/{folder / 'model'}", **data, "lora__head": head, **more}

    return prepare


def language(family: str, *, wide: bool = False, **more: Any) -> Prepare:
    def prepare(folder: Path) -> dict[str, Any]:
        save_hf(folder / "model", family, "causal", **(WIDE if wide else {}))
        data = {"data__name": save_rows(folder / "train.jsonl", sums(30)), "data__test": "hold-out:0.2"}
        return {"model__name": f"hf/{folder / 'model'}", **data, "data__text": "prompt", "data__response": "response", **more}

    return prepare


def found(labels: str, **more: str) -> Prepare:
    def prepare(folder: Path) -> dict[str, Any]:
        save_timm(folder / "model", "swin", classes=7)
        data = {"data__name": save_found(folder / "found", 40), "data__test": "hold-out:0.3", "data__labels": labels}
        return {
            "model__name": f"timm/{folder / 'model'}",
            **data,
            "lora__head": "auto",
            **{f"data__{key}": value for key, value in more.items()},
        }

    return prepare


def scored_text(family: str, **more: str) -> Prepare:
    def prepare(folder: Path) -> dict[str, Any]:
        save_hf(folder / "model", family, "base")
        data = {"data__name": save_rows(folder / "train.jsonl", scored(40)), "data__test": "hold-out:0.3"}
        return {
            "model__name": f"hf/{folder / 'model'}",
            **data,
            "lora__head": "auto",
            **{f"data__{key}": value for key, value in more.items()},
        }

    return prepare


def embedded(head: str) -> Prepare:
    return lambda folder: {"lora__head": head}


CASES: dict[str, Prepare] = {
    "digits, frozen": embedded("frozen"),
    "digits, trained": embedded("trained"),
    "swin, new head": image("swin", 7, "auto"),
    "vit, new head left frozen": image("vit", 7, "frozen"),
    "vit, published head": image("vit", 3, "auto"),
    "bert, new head": text("bert", "classifier", "trained"),
    "bert, published head": text("bert", "classifier", "auto"),
    "roberta, new head left frozen": text("roberta", "base", "frozen"),
    "distilbert, new head": text("distilbert", "base", "auto"),
    "gpt2 classifier, new head": text("gpt2", "base", "auto"),
    "mean, new head": text("bert", "base", "auto", model__pooling="mean"),
    "mean, new head left frozen": text("distilbert", "base", "frozen", model__pooling="mean"),
    "swin, several classes, new head": found("red,green,blue", problem_type="multi-label"),
    "swin, numbers, new head": found("", problem_type="regression", label="colours", label_range="0,3"),
    "bert, several classes, new head": scored_text("bert", problem_type="multi-label"),
    "bert, numbers, new head": scored_text("bert", problem_type="regression", label="score", label_range="0,10"),
    "gpt2": language("gpt2"),
    "llama": language("llama"),
}
CASES |= {  # weights rounded as on the run; what is computed with them is float32 for a classifier
    f"{name}, bfloat16": lambda folder, prepare=CASES[name]: {**prepare(folder), "model__dtype": "bfloat16"}
    for name in ("swin, new head", "distilbert, new head", "mean, new head left frozen", "gpt2")
}
CASES |= {
    "bert, new head, four bits": text("bert", "classifier", "trained", wide=True, model__dtype="nf4"),
    "mean, new head left frozen, four bits": text("bert", "base", "frozen", wide=True, model__dtype="nf4", model__pooling="mean"),
    "llama, four bits": language("llama", wide=True, model__dtype="nf4"),
}
CASES |= {  # other forms of LoRA, saved as LoRA
    f"{kind}, {strategy}{head}": lambda folder, prepare=CASES[kind + head], strategy=strategy: {
        **prepare(folder),
        "strategy": strategy,
    }
    for kind, strategy, head in (
        ("swin", "fedex-lora", ", new head"),
        ("mean", "flora", ", new head"),
        ("gpt2", "fedex-lora", ""),
    )
}


def plain(case: str) -> str:
    return case.removesuffix(", bfloat16").removesuffix(", four bits")


def is_new(case: str) -> bool:
    return "new head" in case and case != "bert, new head"  # whose weights hold one, which is trained all the same


def is_trained(case: str) -> bool:
    return plain(case).endswith(("trained", "new head"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    made = {}
    for name, prepare in CASES.items():
        folder = tmp_path_factory.mktemp("run")
        settings = small(folder, **{**RUN, **prepare(folder)})
        spy = Spy()
        made[name] = Finished(run_spied(settings, spy), settings, spy)
    return made


def keep(run: Finished) -> None:
    """Write what the run's own model says about the public records beside the run."""
    learner = ModelStore().learner(run.settings)
    learner.adapter.load({name: value for name, value in run.checkpoint.items() if not name.startswith(MORE)})
    records = data_set(run.settings).public(learner.base.encode)
    inputs, labels = records.batch(torch.arange(len(records)))
    with torch.no_grad():
        logits = learner.base.logits(learner.adapter.model.eval(), inputs)
    torch.save({"inputs": inputs, "labels": labels, "logits": logits}, run.path / "inputs.pt")


@pytest.fixture(scope="module")
def elsewhere(runs: dict[str, Finished]) -> dict[str, dict[str, Any]]:
    """What the models say in a process that does not know this package."""
    for run in runs.values():
        keep(run)
    script = Path(__file__).with_name("stock.py")
    done = subprocess.run(
        [sys.executable, str(script), *(str(run.path) for run in runs.values())],
        capture_output=True,
        text=True,
        cwd=script.parent,
    )
    assert not done.returncode, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: found[str(run.path)] for name, run in runs.items()}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_runs_model(case: str, runs: dict[str, Finished], elsewhere: dict[str, dict[str, Any]]) -> None:
    said, summary = elsewhere[case], runs[case].summary
    rounded = case != plain(case)  # the run's activations are, too
    assert said["same"] < (0.1 if rounded else 1e-4)
    if not case.endswith("four bits"):  # a merge rounds to four bits again
        assert said["merged"] < (0.1 if rounded else 1e-3)
    near = 0.1 if rounded else 1e-6
    if "r2" in summary:
        assert said["loss"] == pytest.approx(summary["loss"], abs=1e-4)
    elif summary["labels"]:
        assert said["accuracy"] == pytest.approx(summary["accuracy" if "accuracy" in summary else "exact_match"], abs=near)


@pytest.mark.parametrize("case", CASES)
def test_the_adapter_has_moved_so_that_it_matters(case: str, runs: dict[str, Finished]) -> None:
    moved = "lora_D.weight" if runs[case].settings.strategy == "flora" else "lora_B.weight"
    assert any(bool(value.any()) for name, value in runs[case].checkpoint.items() if name.endswith(moved))


@pytest.mark.parametrize("case", CASES)
def test_a_new_head_is_trained_unless_it_is_to_stay_frozen_and_saved_either_way(case: str, runs: dict[str, Finished]) -> None:
    run = runs[case]
    folder = run.path / "adapter"
    saved = load_file(folder / "adapter_model.safetensors")
    heads = [name for name in saved if "lora_" not in name] or list((folder / "head.safetensors").parent.glob("head.*"))
    assert any("lora_" not in name for name in run.checkpoint) == is_trained(case)
    assert bool(heads) == (is_new(case) or is_trained(case) or case.startswith("bert"))


@pytest.mark.parametrize("case", CASES)
def test_names_and_task_are_said(case: str, runs: dict[str, Finished]) -> None:
    run = runs[case]
    folder, labels = run.path / "adapter", run.summary["labels"]
    config = strict_json((folder / "adapter_config.json").read_text())
    base = config["base_model_name_or_path"]
    assert base is None or Path(base).is_absolute()  # a folder that has no public name
    if run.settings.model.name.startswith("hf/"):
        tasks = {"mean": "FEATURE_EXTRACTION", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM"}
        assert config["task_type"] == tasks.get(case.partition(",")[0], "SEQ_CLS") and config["auto_mapping"] is None
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n") and f"| 1 | {labels[1]} |" in card if labels else True
    if labels:
        about = strict_json((folder / "config.json").read_text())
        assert about["id2label"] == {str(number): name for number, name in enumerate(labels)}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
