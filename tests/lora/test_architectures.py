"""The engine on every architecture it is held to, at small size, against one record at a time in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.architectures import ARCHITECTURES, build
from lalora_flwr.config import LoraSettings
from lalora_flwr.data.inputs import rows
from lalora_flwr.lora.adapter import attach_adapter, set_active
from lalora_flwr.lora.dropout import remove_dropout
from lalora_flwr.lora.per_sample import PerSampleGradients
from lalora_flwr.lora.self_check import self_check
from lalora_flwr.models.base import BaseModel
from lalora_flwr.privacy.mechanism import clip

RECORDS = 4
LANGUAGE_MODELS = ("gpt2", "llama")  # no classification head to train
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepared(
    name: str, head: str, targets: str = "auto", dtype: torch.dtype = torch.float64
) -> tuple[BaseModel, torch.nn.Module]:
    base = build(name, small=True)
    base.module.to(dtype)
    model = attach_adapter(base, LoraSettings(rank=3, alpha=6.0, head=head, targets=targets), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # B off zero, or A's gradients are zero
        for parameter_name, p in model.named_parameters():
            if "lora_" in parameter_name:
                p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * 0.3
    return base, model.to(DEVICE).eval()


def batch(base: BaseModel) -> tuple[Tensor | dict[str, Tensor], Tensor]:
    inputs, labels = base.synthetic_batch(RECORDS, torch.Generator().manual_seed(3))
    moved = {k: v.to(DEVICE) for k, v in inputs.items()} if isinstance(inputs, dict) else inputs.to(DEVICE)
    return moved, labels.to(DEVICE)


def alone(base: BaseModel, model: torch.nn.Module, factors: str) -> list[dict[str, Tensor]]:
    """Each record's gradients by plain autograd on a model that the engine has not touched."""
    inputs, labels = batch(base)
    active = set_active(model, frozenset(factors))
    gradients = []
    for j in range(RECORDS):
        loss = base.losses(model, rows(inputs, slice(j, j + 1)), labels[j : j + 1]).sum()
        found = torch.autograd.grad(loss, list(active.values()), allow_unused=True)
        gradients.append({n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(active.items(), found, strict=True)})
    return gradients


def assert_exact(name: str, factors: str, head: str, targets: str = "auto") -> None:
    reference = alone(*prepared(name, head, targets), factors)
    base, model = prepared(name, head, targets)
    engine = PerSampleGradients(model)
    set_active(model, frozenset(factors))
    inputs, labels = batch(base)
    together = engine(RECORDS, lambda: base.losses(model, inputs, labels))
    assert together.keys() == reference[0].keys()
    norms = torch.stack([torch.stack([g.square().sum() for g in record.values()]).sum().sqrt() for record in reference])
    for key, gradient in together.items():
        expected = torch.stack([record[key] for record in reference])
        assert (gradient - expected).abs().max() <= 1e-10 * max(expected.abs().max(), 1e-6), key
    got = torch.stack([g.flatten(1).square().sum(1) for g in together.values()]).sum(0).sqrt()
    assert torch.allclose(got, norms, rtol=1e-10)
    bound = float(norms.median())
    sums, _ = clip({key: g.double() for key, g in together.items()}, bound)
    for key, total in sums.items():
        expected = sum(record[key] * min(1.0, bound / float(n)) for record, n in zip(reference, norms, strict=True))
        assert torch.allclose(total.double(), expected, rtol=1e-5, atol=1e-6 * bound), key  # clip sums in float32


@pytest.mark.parametrize("factors", ["A", "B", "AB"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_norms_and_clipped_sums_are_those_of_single_records(name: str, factors: str) -> None:
    assert_exact(name, factors, "frozen")


@pytest.mark.parametrize("factors", ["A", "B", "AB"])
@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in LANGUAGE_MODELS])
def test_with_a_trained_head_too(name: str, factors: str) -> None:
    assert_exact(name, factors, "trained")


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("swin-tiny", "attn.qkv,attn.proj,mlp.fc1,mlp.fc2,downsample.reduction"),  # 4-D inputs outside the windows
        ("vit-base", "qkv,attn.proj,fc1,fc2"),
        ("llama", "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"),
        ("gpt2", "c_attn,c_proj,c_fc"),
        ("distilbert", "q_lin,lin1,lin2"),
    ],
)
def test_on_every_linear_layer(name: str, targets: str) -> None:
    assert_exact(name, "AB", "frozen", targets)


@pytest.mark.parametrize("name", ["swin-tiny", "vit-base", "roberta-base", "llama"])
def test_under_gradient_checkpointing(name: str) -> None:
    found = []
    for recompute in (False, True):
        base, model = prepared(name, "frozen")
        if recompute:
            base.checkpoint_activations()
        model.train()  # transformers recompute only in training mode
        set_active(model, frozenset("AB"))
        inputs, labels = batch(base)
        remove_dropout(model)
        found.append(PerSampleGradients(model)(RECORDS, lambda: base.losses(model, inputs, labels)))  # noqa: B023
    for key, gradient in found[1].items():
        assert torch.allclose(gradient, found[0][key], rtol=1e-9, atol=1e-12), key


@pytest.mark.parametrize(
    ("name", "head"), [(n, "frozen") for n in ARCHITECTURES] + [(n, "trained") for n in ARCHITECTURES if n not in LANGUAGE_MODELS]
)
def test_the_check_before_training_passes(name: str, head: str) -> None:
    base, model = prepared(name, head, dtype=torch.float32)
    self_check(base, model, PerSampleGradients(model))
