"""Every form on every architecture where it makes sense, against one record at a time in float64; what else is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.architectures import build
from lalora_flwr.adapter.form import Adapter, AdapterForm
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.base import BaseModel
from lalora_flwr.settings import LoraSettings
from lalora_flwr.settings.choices import FORMS

TABLE = {  # family of architecture: one that stands for it
    "ViT": "vit-base",
    "Swin": "swin-tiny",
    "BERT, MiniLM": "minilm",
    "RoBERTa": "roberta-base",
    "DistilBERT": "distilbert",
    "GPT-2": "gpt2",
    "Llama": "llama",
}
NAMES = ("bitfit", "bottleneck", "soft-prompt", "visual-prompt", "pixel-prompt", "head")


def attached(form: str, name: str, head: str = "auto", dtype: torch.dtype = torch.float64) -> tuple[BaseModel, Adapter]:
    base = build(name, small=True)
    base.module.requires_grad_(False).to(dtype)
    adapter = FORMS.get(form, AdapterForm).attach(base, LoraSettings(head=head, size=3), 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # off zero, and so large that it shows
        for parameter in adapter.parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return base, adapter


def supported() -> list[tuple[str, str]]:
    """The pairs of form and family that the documentation's table says yes to."""
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    header = next(row for row in rows if row[0] == "`lora.form`")
    table = {row[0].strip("`"): row for row in rows[rows.index(header) :] if row[0].strip("`") in NAMES}
    assert set(table) == set(NAMES) and header[1:] == list(TABLE)
    return [(form, family) for form in NAMES for family, cell in zip(header[1:], table[form][1:], strict=True) if cell == "yes"]


PAIRS = [(form, family) for form in NAMES for family in TABLE]


@pytest.mark.parametrize(("form", "family"), PAIRS)
def test_the_table_of_forms_is_true(form: str, family: str) -> None:
    if (form, family) in supported():
        exact(form, TABLE[family])
    else:
        with pytest.raises(ConfigError, match=r"^(lora\.form|lora\.head) = "):
            attached(form, TABLE[family])


@pytest.mark.parametrize("form", ["bitfit", "bottleneck", "soft-prompt"])
@pytest.mark.parametrize("name", ["gpt2-classifier", "llama-classifier"])
def test_decoders_that_classify(form: str, name: str) -> None:
    if (form, name) == ("bitfit", "llama-classifier"):
        return
    exact(form, name, "trained")


@pytest.mark.parametrize("form", ["bitfit", "bottleneck", "soft-prompt", "visual-prompt", "pixel-prompt"])
def test_with_a_trained_head_too(form: str) -> None:
    exact(form, "distilbert" if form not in ("visual-prompt", "pixel-prompt") else "vit-base", "trained")


def exact(form: str, name: str, head: str = "auto") -> None:
    base, adapter = attached(form, name, head)
    *_, (inputs, labels) = base.check_batches(torch.Generator().manual_seed(3))
    if isinstance(inputs, Tensor):
        inputs = inputs.double()
    active = adapter.activate(adapter.trainable)
    adapter.model.eval()
    expected = []  # by plain autograd, on a model that the engine has not touched
    for j in range(len(labels)):
        loss = adapter.losses(base, *base.single(inputs, labels, j)).sum()
        expected.append(dict(zip(active, torch.autograd.grad(loss, list(active.values())), strict=True)))
    engine = PerSampleGradients(adapter.model, adapter.parameters)
    together = engine(len(labels), lambda: adapter.losses(base, inputs, labels))
    assert list(together) == list(adapter.layout)
    for key, gradient in together.items():
        alone = torch.stack([record[key] for record in expected])
        assert alone.abs().max() > 1e-12, key
        assert (gradient - alone).abs().max() <= 1e-10 * max(float(alone.abs().max()), 1e-6), key
