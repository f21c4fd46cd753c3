"""The engine on every architecture it is held to, at small size, against one record at a time in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.architectures import ARCHITECTURES, SMALL_ONLY, build
from lalora_flwr.gradients.dropout import remove_dropout
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.base import BaseModel
from lalora_flwr.models.targets import CAUSAL, TRANSFORMERS_TARGETS
from lalora_flwr.models.text import CausalLanguageModel
from lalora_flwr.privacy.clip import clip
from lalora_flwr.settings import LoraSettings
from tests.adapters import attach_adapter, check, engine_for, set_active

FLOAT32_SOFTMAX = ("bloom", "gemma2")  # whatever the weights
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
    """Images, or texts from very short to the longest."""
    *_, (inputs, labels) = base.check_batches(torch.Generator().manual_seed(3))
    moved = {k: v.to(DEVICE) for k, v in inputs.items()} if isinstance(inputs, dict) else inputs.to(DEVICE)
    return moved, labels.to(DEVICE)


def alone(base: BaseModel, model: torch.nn.Module, factors: str) -> list[dict[str, Tensor]]:
    """Each record's gradients, without padding, by plain autograd on a model that the engine has not touched."""
    inputs, labels = batch(base)
    active = set_active(model, frozenset(factors))
    gradients = []
    for j in range(len(labels)):
        loss = base.losses(model, *base.single(inputs, labels, j)).sum()
        found = torch.autograd.grad(loss, list(active.values()), allow_unused=True)
        gradients.append({n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(active.items(), found, strict=True)})
    return gradients


def assert_exact(
    name: str, factors: str, head: str, targets: str = "auto", tolerance: float = 1e-10, floor: float = 1e-6
) -> None:
    reference = alone(*prepared(name, head, targets), factors)
    base, model = prepared(name, head, targets)
    engine = engine_for(model)
    set_active(model, frozenset(factors))
    inputs, labels = batch(base)
    together = engine(len(labels), lambda: base.losses(model, inputs, labels))
    assert together.keys() == reference[0].keys()
    norms = torch.stack([torch.stack([g.square().sum() for g in record.values()]).sum().sqrt() for record in reference])
    for key, gradient in together.items():
        expected = torch.stack([record[key] for record in reference])
        assert expected.any(), key
        assert (gradient - expected).abs().max() <= tolerance * max(expected.abs().max(), floor), key
    got = torch.stack([g.flatten(1).square().sum(1) for g in together.values()]).sum(0).sqrt()
    assert torch.allclose(got, norms, rtol=tolerance)
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


@pytest.mark.parametrize("name", SMALL_ONLY)
def test_the_other_architectures_are_exact_too(name: str) -> None:
    tolerance = 1e-6 if name.startswith(FLOAT32_SOFTMAX) else 1e-10
    assert_exact(name, "AB", "trained" if build(name, small=True).head else "frozen", tolerance=tolerance, floor=0.0)


def test_every_admitted_text_architecture_is_among_them() -> None:
    built = [build(name, small=True) for name in (*ARCHITECTURES, *SMALL_ONLY)]
    assert {base.name.removeprefix("hf/") for base in built if base.name.startswith("hf/")} == set(TRANSFORMERS_TARGETS)
    assert {base.name.removeprefix("hf/") for base in built if isinstance(base, CausalLanguageModel)} == set(CAUSAL)


def gemma2(dtype: torch.dtype) -> tuple[BaseModel, torch.nn.Module]:
    """With a window of attention that is shorter than the padding, so that padded places see nothing but padding."""
    base = build("gemma2", small=True)
    for layer in base.module.model.layers:
        layer.self_attn.sliding_window = 4
    base.module.config.sliding_window = 4
    base.module.to(dtype)
    return base, attach_adapter(base, LoraSettings(rank=3), seed=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemma2_keeps_records_apart_in_the_precisions_that_a_run_can_have(dtype: torch.dtype) -> None:
    base, model = gemma2(dtype)
    check(base, model)
    inputs, labels = batch(base)
    assert base.losses(model, inputs, labels).isfinite().all()


def test_gemma2_in_float64_is_not_a_number_and_refused() -> None:
    """Its mask holds the least float64, which its float32 softmax takes for minus infinity: NaN wherever all is masked."""
    base, model = gemma2(torch.float64)
    with pytest.raises(ConfigError):
        check(base, model)


@pytest.mark.parametrize("name", ["swin-tiny", "vit-base", "roberta-base", "llama", "modernbert", "swinv2-tiny"])
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
        found.append(engine_for(model)(len(labels), lambda: base.losses(model, inputs, labels)))  # noqa: B023
    for key, gradient in found[1].items():
        assert torch.allclose(gradient, found[0][key], rtol=1e-9, atol=1e-12), key


@pytest.mark.parametrize(
    ("name", "head"),
    [(n, "frozen") for n in (*ARCHITECTURES, *SMALL_ONLY)] + [(n, "trained") for n in ARCHITECTURES if n not in LANGUAGE_MODELS],
)
def test_the_check_before_training_passes(name: str, head: str) -> None:
    base, model = prepared(name, head, dtype=torch.float32)
    check(base, model)
