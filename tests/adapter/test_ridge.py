"""The ridge head: its gradients are the records' products, its solution the closed form, its noise what is antisymmetric."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lalora_flwr.adapter.ridge import CONSTANT, LENGTH, RidgeAdapter, RidgeLayer, solution
from lalora_flwr.data.data_set import data_set
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.tasks.multi_label import MultiLabel
from lalora_flwr.tasks.problem import Problem
from lalora_flwr.tasks.single_label import SingleLabel
from lalora_flwr.training.learner import Learner, ModelStore
from lalora_flwr.wire.replies import COUNTERS
from tests.conftest import Finished, Spy, arrays_of, run_spied, small
from tests.models.files import save_rows, scored, texts
from tests.models.folders import save_found, save_hf, save_timm
from tests.reference import generator

ONCE: dict[str, Any] = {
    "strategy": "ridge-head",
    "num_rounds": 1,
    "train__local_steps": 1,
    "train__batch_size": 1000,
    "data__min_records": 1,
    "data__max_tokens": 24,
}


def digits(folder: Path) -> dict[str, Any]:
    return {}


def text(folder: Path, **more: Any) -> dict[str, Any]:
    save_hf(folder / "model", "distilbert", "base")
    data = {"data__name": save_rows(folder / "train.jsonl", texts(80)), "data__test": "hold-out:0.3"}
    return {"model__name": f"hf/{folder / 'model'}", **data, **more}


def several(folder: Path) -> dict[str, Any]:
    save_timm(folder / "model", "swin", classes=7)
    data = {"data__name": save_found(folder / "found", 60), "data__test": "hold-out:0.3", "data__labels": "red,green,blue"}
    return {"model__name": f"timm/{folder / 'model'}", **data, "data__problem_type": "multi-label"}


def tokens(folder: Path) -> dict[str, Any]:
    """A head without an intercept that is applied to every token."""
    save_hf(folder / "model", "gpt2", "base")
    data = {"data__name": save_rows(folder / "train.jsonl", texts(80)), "data__test": "hold-out:0.3"}
    return {"model__name": f"hf/{folder / 'model'}", **data}


KINDS = {
    "digits": digits,
    "text": text,
    "mean": lambda f: text(f, model__pooling="mean"),
    "several classes": several,
    "tokens": tokens,
}


def learner_of(folder: Path, kind: str = "digits") -> Learner:
    return ModelStore().learner(small(folder, **{**ONCE, **KINDS[kind](folder)}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_records_gradient_is_its_products_and_all_are_of_one_length(kind: str, tmp_path: Path) -> None:
    learner = learner_of(tmp_path, kind)
    (inputs, labels), adapter = learner.base.synthetic_batch(5, generator(1)), learner.adapter
    assert isinstance(adapter, RidgeAdapter)
    centre = torch.randn(adapter._layer.centre.shape, generator=generator(2)) / 8
    active = adapter.activate(adapter.trainable)
    adapter.load({**adapter.state(), f"{adapter._path}.centre": centre})
    gradients, _ = learner.gradients(inputs, labels)
    (gram, cross), seen = [gradients[name] for name in active], adapter._layer.seen
    y = learner.base.problem.directions(labels, learner.base.num_classes)
    for j in range(5):
        x = (seen[j] - centre) / (seen[j] - centre).norm()
        torch.testing.assert_close(gram[j], -LENGTH * 0.5**0.5 * torch.outer(x, x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cross[j], -LENGTH * 0.5**0.5 * torch.outer(y[j].float(), x), rtol=1e-4, atol=1e-5)
        assert float(gram[j].square().sum() + cross[j].square().sum()) == pytest.approx(LENGTH**2, rel=1e-5)


def sums(width: int = 12, records: int = 400, noise: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = generator(3)
    x = nn.functional.normalize(torch.randn(records, width, generator=draw, dtype=torch.float64) + 0.5, dim=1)
    y = nn.functional.normalize(torch.randn(records, 3, generator=draw, dtype=torch.float64), dim=1)
    gram = 0.5**0.5 * x.T @ x + noise * torch.randn(width, width, generator=draw, dtype=torch.float64)
    cross = 0.5**0.5 * y.T @ x + noise * torch.randn(3, width, generator=draw, dtype=torch.float64)
    return x, y, gram, cross


def test_without_noise_it_is_least_squares_whatever_the_scale() -> None:
    x, y, gram, cross = sums()
    want = torch.linalg.lstsq(x, y).solution.T
    for scale in (1e-6, 1.0, 1e6):
        torch.testing.assert_close(solution(scale * gram, scale * cross), want, rtol=1e-6, atol=1e-8)
    assert not solution(torch.zeros(4, 4), torch.zeros(3, 4)).any()


def test_with_noise_the_eigenvalues_have_the_floor_that_the_noise_asks_for() -> None:
    noise = 10.0
    _, _, gram, cross = sums(40, 4000, noise)
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2 / 0.5**0.5)
    floor = noise * (40 / 0.5) ** 0.5
    assert values.min() < floor < values.max()
    want = (cross / 0.5**0.5 @ vectors) / values.clamp(min=floor) @ vectors.T
    assert (solution(gram, cross) - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_without_a_learning_rate_and_in_one_release(kind: str, tmp_path: Path) -> None:
    heads, scores = [], []
    for number, lr in enumerate((0.01, 5.0)):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        settings = small(folder, **{**ONCE, **KINDS[kind](folder), "train__lr": lr, "privacy__epsilon": 100.0})
        run = Finished(run_spied(settings, spy := Spy()), settings, spy)
        (reply, *_) = [reply for _, reply in spy.training(1)]
        assert reply.content[COUNTERS]["steps"] == 1  # type: ignore[call-overload, index]
        heads.append(load_file(run.path / "adapter" / "head.safetensors"))
        scores.append(run.summary["auroc" if kind == "several classes" else "accuracy"])
        assert scores[-1] > {"digits": 0.7, "several classes": 0.75, "mean": 0.5}.get(
            kind, 0.0
        )  # features of a random head know little
    assert abs(scores[0] - scores[1]) < 0.02
    for name, value in heads[0].items():
        torch.testing.assert_close(value, heads[1][name], rtol=1e-2, atol=1e-3 * float(value.abs().max()))


@pytest.mark.parametrize("problem", [SingleLabel(), MultiLabel()], ids=lambda problem: problem.name)
def test_features_that_tell_little_give_the_class_or_classes_that_most_records_have(problem: Problem) -> None:
    """Without an intercept a class that one record in ten has is said of about half of them."""
    draw = generator(5)
    rare = torch.rand(2000, 3, generator=draw) < 0.1
    targets = torch.where(rare[:, 0], 1, 0) if problem.name == "single-label" else rare.float()
    features = torch.randn(2000, 8, generator=draw) + 0.5 * rare[:, :1]
    layer = RidgeLayer(nn.Linear(8, 3))
    centre = torch.cat([features.mean(0), torch.tensor([-CONSTANT * 8**0.5])])
    with torch.no_grad():
        layer.centre.copy_(centre)
    layer(features)
    layer.losses(problem.directions(targets, 3)).sum().backward()
    with torch.no_grad():
        for sums in (layer.gram, layer.cross):
            assert sums.grad is not None
            sums.copy_(-sums.grad)
    layer.solve()
    most = torch.zeros(2000, 3)
    most[:, 0] = problem.name == "single-label"
    constant = float(problem.right(most - 0.5, targets).double().mean())
    outputs = layer(features)
    assert float(problem.right(outputs, targets).double().mean()) > constant - 0.02
    torch.testing.assert_close(layer.as_linear()(features), outputs, rtol=1e-4, atol=1e-5)


def test_the_centre_is_made_of_public_features_and_only_goes_down(tmp_path: Path) -> None:
    settings = small(tmp_path, **ONCE)
    run = Finished(run_spied(settings, spy := Spy()), settings, spy)
    learner = ModelStore().learner(settings)
    assert isinstance(learner.adapter, RidgeAdapter)
    inputs, _ = data_set(settings).public(learner.base.encode).batch(torch.arange(297))
    with torch.no_grad():
        learner.base.logits(learner.adapter.model, inputs)
    seen = learner.adapter._layer.seen.double()
    centre = seen.mean(0)
    centre[-1] = -CONSTANT * (seen - seen.mean(0)).square().sum(1).mean().sqrt()
    torch.testing.assert_close(run.checkpoint["head.centre"].double(), centre, rtol=1e-4, atol=1e-5)
    for sent, reply in spy.training(1):
        assert set(arrays_of(sent)) == {"head.gram", "head.cross", "head.centre"}
        assert set(arrays_of(reply)) == {"head.gram", "head.cross"}


def test_steps_and_rounds_are_one_long_sum(tmp_path: Path) -> None:
    whole = {**ONCE, "privacy__epsilon": float("inf")}
    once, often = tmp_path / "once", tmp_path / "often"
    found = []
    for folder, more in ((once, {}), (often, {"num_rounds": 3, "train__local_steps": 2})):
        folder.mkdir()
        settings = small(folder, **{**whole, **more})
        found.append(load_file(run_spied(settings, Spy()) / "adapter" / "adapter.safetensors"))
    assert torch.equal(*(sums.pop("head.centre") for sums in found))
    size = [torch.cat([value.flatten() for value in sums.values()]).norm() for sums in found]
    for name, value in found[0].items():
        torch.testing.assert_close(value / size[0], found[1][name] / size[1], rtol=1e-4, atol=1e-6)


SCRIPT = """
import json, re, sys, torch
card, kept = open(sys.argv[1] + "/README.md", encoding="utf-8").read(), torch.load(sys.argv[2])
names = {}
for block in re.findall(r"```python\\n(.*?)```", card, re.S):
    exec(block.replace('adapter = "."', f"adapter = {sys.argv[1]!r}"), names)
with torch.no_grad():
    inputs = kept["inputs"]
    said = names["logits"](**inputs) if "logits" in names else (
        names["model"](**inputs).logits if isinstance(inputs, dict) else names["model"](inputs))
assert not any(name.split(".")[0] == "lalora_flwr" for name in sys.modules)
print(json.dumps(float((said - kept["logits"]).abs().max() / kept["logits"].abs().max())))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_its_model_card_loads_it_without_this_package(kind: str, tmp_path: Path) -> None:
    settings = small(tmp_path, **{**ONCE, **KINDS[kind](tmp_path), "privacy__epsilon": 100.0, "model__dtype": "float32"})
    run = Finished(run_spied(settings, spy := Spy()), settings, spy)
    learner = ModelStore().learner(settings)
    learner.adapter.load(run.checkpoint)
    inputs, _ = data_set(settings).public(learner.base.encode).batch(torch.arange(6))
    with torch.no_grad():
        logits = learner.base.logits(learner.adapter.model.eval(), inputs)
    torch.save({"inputs": inputs, "logits": logits}, tmp_path / "kept.pt")
    call = [sys.executable, "-c", SCRIPT, str(run.path / "adapter"), str(tmp_path / "kept.pt")]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path)
    assert not done.returncode, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) < 1e-4


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"train__optimizer": "adamw"}, "train.optimizer = 'adamw': must be 'sgd'"),
        ({"lora__schedule": "both"}, "lora.schedule = 'both': must be 'auto'"),
        ({"privacy__clip_norm": 101.0}, "privacy.clip-norm = 101: at most 100"),
        ({"train__lr": 200.0}, "train.lr = 200: times all local steps at most 100"),
    ],
)
def test_what_it_cannot_be_is_refused(more: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{says}"):
        small(tmp_path, **{**ONCE, **more})


def test_numbers_are_refused(tmp_path: Path) -> None:
    save_hf(tmp_path / "model", "distilbert", "base")
    data = {"data__name": save_rows(tmp_path / "train.jsonl", scored(20)), "data__label": "score", "data__label_range": "0,10"}
    settings = small(tmp_path, **{**ONCE, **data, "model__name": f"hf/{tmp_path / 'model'}", "data__problem_type": "regression"})
    with pytest.raises(ConfigError, match="predicts classes"):
        ModelStore().learner(settings)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_of_a_head_on_every_token_the_records_features_are_those_of_the_token_that_counts(family: str, tmp_path: Path) -> None:
    save_hf(tmp_path / "model", family, "base")
    data = {"data__name": save_rows(tmp_path / "train.jsonl", texts(80)), "data__test": "hold-out:0.3"}
    settings = small(tmp_path, **{**ONCE, **data, "model__name": f"hf/{tmp_path / 'model'}"})
    learner = ModelStore().learner(settings)
    base, adapter = learner.base, learner.adapter
    assert isinstance(adapter, RidgeAdapter)
    state = adapter.prepared(base, public := data_set(settings).public(base.encode))
    assert not state[f"{adapter._path}.centre"].any()
    draw = generator(4)
    adapter.load(
        {name: torch.randn(value.shape, generator=draw) if "centre" not in name else value for name, value in state.items()}
    )
    inputs, labels = public.batch(torch.arange(9))
    assert len(set(inputs["attention_mask"].sum(1).tolist())) > 1
    with torch.no_grad():
        logits = base.logits(adapter.model.eval(), inputs)
        adapter.losses(base, inputs, labels)
    last = inputs["attention_mask"].cumsum(1).argmax(1)
    assert adapter._layer.seen.shape == (9, len(adapter._layer.gram))
    torch.testing.assert_close(adapter._layer.seen @ adapter._layer.head.T, logits)
    with torch.no_grad():
        hidden = adapter.model.base_model(**inputs).last_hidden_state
    torch.testing.assert_close(adapter._layer.seen[:, :-1], hidden[torch.arange(9), last])


def test_a_head_of_which_no_single_token_counts_is_refused() -> None:
    layer = RidgeLayer(nn.Linear(4, 3))
    layer.marks = True
    outputs = layer(torch.randn(2, 5, 4, generator=generator(1)))
    with pytest.raises(RuntimeError, match="not those of one token"):
        layer.choose(outputs.mean(1)[:, 0] + 0.5)
    layer.choose(outputs[:, 3, 0])
    assert layer.seen.shape == (2, 5)
    with pytest.raises(RuntimeError, match="4-dimensional features"):
        layer(torch.zeros(2, 3, 5, 4))
