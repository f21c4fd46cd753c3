"""Whole runs of every form: what travels, what the folder gives elsewhere, and which settings are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from lalora_flwr.data.data_set import data_set
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.server.card import MEAN, loading
from lalora_flwr.server.plan import make_plan
from lalora_flwr.training.learner import ModelStore
from tests.conftest import Finished, Spy, arrays_of, run_spied, small
from tests.models.files import save_rows, sums, texts
from tests.models.folders import save_found, save_hf, save_timm

PLAIN: dict[str, Any] = {"lora__rank": 4, "lora__alpha": 8.0, "lora__targets": "auto", "lora__head": "auto"}
SHORT: dict[str, Any] = {**PLAIN, "num_rounds": 1, "train__local_steps": 1, "data__min_records": 1, "data__max_tokens": 16}


def digits(folder: Path) -> dict[str, Any]:
    return {}


def swin(folder: Path) -> dict[str, Any]:
    save_timm(folder / "model", "swin", classes=7)
    data = {"data__name": save_found(folder / "found", 40), "data__test": "hold-out:0.3", "data__labels": "red,green,blue"}
    return {"model__name": f"timm/{folder / 'model'}", **data, "data__problem_type": "multi-label"}


def text(folder: Path, family: str = "distilbert", kind: str = "base", **more: Any) -> dict[str, Any]:
    save_hf(folder / "model", family, kind)
    data = {"data__name": save_rows(folder / "train.jsonl", texts(60)), "data__test": "hold-out:0.3"}
    return {"model__name": f"hf/{folder / 'model'}", **data, **more}


def language(folder: Path) -> dict[str, Any]:
    data = {"data__name": save_rows(folder / "sums.jsonl", sums(60)), "data__text": "prompt", "data__response": "response"}
    return {**text(folder, "gpt2", "causal"), **data, "data__answer": "#### (.+)"}


KINDS: dict[str, Any] = {
    "digits": digits,
    "swin": swin,
    "distilbert": text,
    "bert": lambda folder: text(folder, "bert", "classifier"),
    "roberta": lambda folder: text(folder, "roberta", "classifier"),
    "mean": lambda folder: text(folder, model__pooling="mean"),
    "gpt2": lambda folder: text(folder, "gpt2", "classifier"),
    "language": language,
}
RUNS = [
    *[("bitfit", kind) for kind in ("digits", "distilbert", "mean")],
    *[("bottleneck", kind) for kind in ("digits", "swin", "mean")],
    *[("soft-prompt", kind) for kind in ("distilbert", "bert", "roberta", "gpt2", "language")],
    ("visual-prompt", "digits"),
    *[("pixel-prompt", kind) for kind in ("digits", "swin")],
    *[("head-only", kind) for kind in ("digits", "mean")],
]


@pytest.mark.parametrize(("strategy", "kind"), RUNS)
def test_its_folder_gives_the_model_without_this_package(strategy: str, kind: str, tmp_path: Path) -> None:
    settings = small(tmp_path, **{**SHORT, "strategy": strategy, **KINDS[kind](tmp_path)})
    learner = ModelStore().learner(settings)
    with torch.no_grad():
        for value in learner.adapter.parameters.values():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(4)))
    inputs, _ = data_set(settings).public(learner.base.encode).batch(torch.arange(4))
    if isinstance(inputs, dict) and strategy == "soft-prompt":  # one text: stock PEFT hides padding from decoders that classify
        inputs = {name: value[:1, : int(inputs["attention_mask"][0].sum())] for name, value in inputs.items()}
    learner.adapter.save(tmp_path / "adapter")
    lines = loading(learner.base) if learner.adapter.in_peft else learner.adapter.loading()
    loaded = loaded_by(
        "\n".join(lines) + ("\n" + MEAN.split("```python")[1][:-3] if kind == "mean" else ""), tmp_path / "adapter"
    )
    assert isinstance(loaded["model"], PeftModel) == learner.adapter.in_peft
    with torch.no_grad():
        logits = learner.base.logits(learner.adapter.model.eval(), inputs)
        network = loaded.get("logits", loaded["model"])
        said = network(**inputs) if isinstance(inputs, dict) else network(inputs)
    said = said if isinstance(said, torch.Tensor) else said.logits
    torch.testing.assert_close(said[..., -logits.shape[-2] :, :], logits, rtol=1e-4, atol=1e-4)


def loaded_by(code: str, folder: Path) -> dict[str, Any]:
    """What the Python of a model card makes."""
    names: dict[str, Any] = {}
    exec(code.replace('adapter = "."', f"adapter = {str(folder)!r}"), names)
    return names


@pytest.mark.parametrize(("strategy", "kind"), [("bottleneck", "digits"), ("soft-prompt", "language")])
def test_a_run_moves_the_form_alone_as_planned(strategy: str, kind: str, tmp_path: Path) -> None:
    settings = small(tmp_path, **{**SHORT, "strategy": strategy, **KINDS[kind](tmp_path)})
    run = Finished(run_spied(settings, spy := Spy()), settings, spy)
    plan, learner = make_plan(settings), ModelStore().learner(settings)
    assert plan.trainable == sum(value.numel() for value in learner.initial.values())
    assert run.metrics[0]["bytes_up"] == 3 * plan.bytes_up[0] and run.metrics[0]["bytes_down"] == 3 * plan.bytes_down
    for order, reply in spy.training(1):
        assert set(arrays_of(order)) == set(arrays_of(reply)) == learner.adapter.layout.names
    assert all(not torch.equal(run.checkpoint[name], value) for name, value in learner.initial.items())
    card = (run.path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f"tags: [{strategy}," in card and "rank" not in card


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"strategy": "bitfit", "lora__rank": 8}, "lora.rank = 8: means nothing to the form 'bitfit'; leave it 4"),
        ({"strategy": "la-lora", "lora__size": 8}, "lora.size = 8: means nothing to the form 'lora'"),
        ({"strategy": "la-lora", "lora__form": "bitfit"}, "lora.schedule = 'step:BA': the form trains no lora_A; take 'both'"),
        ({"strategy": "bitfit", "lora__schedule": "B"}, "lora.schedule = 'B': the form trains no lora_B; take 'both'"),
        ({"strategy": "soft-prompt"}, "lora.form = 'soft-prompt': is for texts"),
        ({"strategy": "fedsvd", "lora__form": "bitfit"}, "lora.schedule = 'B': the form trains no lora_B"),
        (
            {"strategy": "fedsvd", "lora__form": "bitfit", "lora__schedule": "both"},
            "merge.name = 'svd': combines lora_A, which the form 'bitfit' does not train",
        ),
        ({"strategy": "fedsvd", "merge__travel": "trained"}, "merge.travel = 'trained': the merge 'svd' changes what does not"),
        ({"strategy": "head-only", "lora__head": "frozen"}, "lora.head = 'frozen': the form 'head' trains the head and nothing"),
        ({"strategy": "dp-lora", "lora__form": "ridge-head"}, "lora.form = 'ridge-head': needs a method of its own"),
        ({"strategy": "ridge-head", "lora__form": "bitfit"}, "lora.form = 'bitfit': must be 'auto' for strategy = 'ridge-head'"),
        ({"strategy": "dp-lora", "lora__form": "bitfitt"}, "lora.form = 'bitfitt': must be one of .*did you mean bitfit?"),
        ({"merge__travel": "nothing"}, "merge.travel = 'nothing': must be one of auto, everything, trained, everything-down"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_is_loaded(more: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{says}"):
        small(tmp_path, **{**PLAIN, **more})


def test_what_only_the_model_tells_is_refused_by_the_plan(tmp_path: Path) -> None:
    for number, (more, says) in enumerate(
        [
            (text, "lora.size = 30: with texts of 16 tokens above the 40 positions of .*; set data.max-tokens to at most 10"),
            (KINDS["mean"], "lora.form = 'soft-prompt': with model.pooling = 'mean' the prompt would be averaged"),
        ]
    ):
        (folder := tmp_path / str(number)).mkdir()
        settings = small(folder, **{**SHORT, "strategy": "soft-prompt", "lora__size": 30, **more(folder)})
        with pytest.raises(ConfigError, match=says):
            make_plan(settings)
    settings = small(tmp_path, **{**PLAIN, "strategy": "pixel-prompt", "lora__size": 4})
    with pytest.raises(ConfigError, match=r"lora\.size = 4: a frame as wide covers the whole image of 8 x 8 pixels"):
        make_plan(settings)


@pytest.mark.parametrize("form", ["bitfit"])
def test_a_ridge_head_goes_before_the_forms_too(form: str, tmp_path: Path) -> None:
    more = {"strategy": "dp-lora", "lora__form": form, "lora__head": "ridge", "num_rounds": 2, "train__local_steps": 1}
    settings = small(tmp_path, **{**PLAIN, **more})
    run = Finished(run_spied(settings, spy := Spy()), settings, spy)
    sent = arrays_of(spy.training(2)[0][0])
    assert float(sent["head.weight"].norm()) > 0 and run.metrics[-1]["round"] == 2


@pytest.mark.parametrize(("travel", "down", "up"), [("trained", 1, 1), ("everything", 2, 2), ("everything-down", 2, 1)])
def test_travel_is_a_key(travel: str, down: int, up: int, tmp_path: Path) -> None:
    settings = small(tmp_path, strategy="ffa-lora", num_rounds=1, merge__travel=travel)
    run = Finished(run_spied(settings, spy := Spy()), settings, spy)
    slots = len(ModelStore().learner(settings).initial) // 2  # of each factor
    for order, reply in run.spy.training(1):
        assert (len(arrays_of(order)), len(arrays_of(reply))) == (down * slots, up * slots)
