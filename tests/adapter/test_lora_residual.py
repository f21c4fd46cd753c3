"""A residual beside the factors: exact per record, never trained, part of what is saved, and plain LoRA there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from lalora_flwr.adapter.lora_export import factored
from lalora_flwr.adapter.lora_residual import LORA_D, LORA_RESIDUAL, ResidualAdapter, residuals_of
from lalora_flwr.adapter.slots import LORA_A, LORA_B
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.gradients.self_check import self_check
from lalora_flwr.methods.schedules import schedule_of
from lalora_flwr.settings import LoraSettings
from tests.reference import BASES, adapter, assert_same_gradients, generator, one_by_one, records_for

LORA = LoraSettings(rank=2, alpha=3.0)
SCALE = 1.5


def stirred(kind: str, seed: int = 4) -> ResidualAdapter:
    """With values everywhere."""
    made = LORA_RESIDUAL.attach(BASES[kind](), LORA, 0)
    assert isinstance(made, ResidualAdapter)
    draw = generator(seed)
    for name, parameter in made.parameters.items():
        if made.layout[name].part != LORA_A:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
    return made


def merged_into_the_weights(on_it: ResidualAdapter, kind: str) -> nn.Module:
    """The plain model whose weights are W0 + s (B A + D), in float64."""
    plain = BASES[kind]().module.double()
    for name_A, name_B, name_D in residuals_of(on_it.layout):
        A, B, D = (on_it.parameters[name].detach().double() for name in (name_A, name_B, name_D))
        linear = plain.get_submodule(on_it.layout[name_A].layer)
        assert isinstance(linear, nn.Linear)
        linear.weight.data += SCALE * (B @ A + D)
    return plain


@pytest.mark.parametrize("kind", sorted(BASES))
def test_the_model_is_the_one_with_changed_weights_and_starts_as_lora(kind: str) -> None:
    on_it = stirred(kind)
    x = records_for(BASES[kind](), 3).inputs.double()
    with torch.inference_mode():
        torch.testing.assert_close(on_it.model.double()(x), merged_into_the_weights(on_it, kind)(x))
    fresh, lora = LORA_RESIDUAL.attach(BASES[kind](), LORA, 0), adapter(BASES[kind]())
    for name, value in fresh.state().items():
        assert torch.equal(value, lora.state()[name]) if name in lora.layout else not value.any()


@pytest.mark.parametrize("kind", sorted(BASES))
def test_factors_have_each_records_own_gradient_and_residuals_none(kind: str) -> None:
    base = BASES[kind]()
    on_it = LORA_RESIDUAL.attach(base, LORA, 0)
    engine = PerSampleGradients(on_it.model, on_it.parameters)
    self_check(base, on_it, engine)
    on_it.load({name: value.float() for name, value in stirred(kind).state().items()})
    on_it.model.double()
    assert on_it.trainable == on_it.layout.of(LORA_A, LORA_B)
    records, layout = records_for(base, 5), on_it.layout
    x, y = records.inputs.double(), records.labels
    naive = stirred(kind).model.double()  # which no engine touched
    for mask in (layout.trainable, layout.of(LORA_B)):
        on_it.activate(mask)
        fast = engine(len(y), lambda: nn.functional.cross_entropy(on_it.model(x), y, reduction="none"))
        for name, p in naive.named_parameters():
            p.requires_grad_(name.replace(".default", "") in mask)

        def alone(model: nn.Module, j: int) -> Tensor:
            return nn.functional.cross_entropy(model(x[j : j + 1]), y[j : j + 1])

        slow = one_by_one(naive, alone, len(y))
        assert_same_gradients(fast, {name.replace(".default", ""): value for name, value in slow.items()})


@pytest.mark.parametrize("text", ["both", "B", "A", "step:BA", "round:BA"])
def test_no_schedule_trains_a_residual(text: str) -> None:
    layout = stirred("mlp").layout
    schedule = schedule_of(text)
    for server_round in (1, 2):
        assert not schedule.trained_in(layout, server_round, 4, {}) & layout.of(LORA_D)
    assert not schedule.ever(layout) & layout.of(LORA_D)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 4), st.integers(0, 10**6), st.sampled_from([1e-6, 1.0, 1e6]))
def test_factors_of_a_matrix_are_exact_and_no_more_than_it_needs(m: int, n: int, rank: int, seed: int, size: float) -> None:
    draw = generator(seed)
    matrix = size * torch.randn(m, rank, generator=draw).double() @ torch.randn(rank, n, generator=draw).double()
    A, B = factored(matrix)
    assert A.dtype == B.dtype == torch.float32 and len(A) == B.shape[1] == max(1, min(m, n, rank))
    torch.testing.assert_close(B.double() @ A.double(), matrix, rtol=0, atol=3e-6 * float(matrix.abs().max()) + 1e-30)


def test_small_parts_of_a_matrix_are_kept_and_rounding_is_not() -> None:
    left, right = (torch.linalg.qr(torch.randn(40, 40, generator=generator(n)).double()).Q for n in (1, 2))
    matrix = left[:, :4] @ torch.diag(torch.tensor([1.0, 1e-2, 1e-4, 1e-6], dtype=torch.float64)) @ right[:4]
    assert len(factored(matrix)[0]) == 4
    assert len(factored(matrix + 1e-9 * torch.randn(40, 40, generator=generator(3)).double())[0]) == 4


def test_the_folder_is_that_of_a_lora_of_sufficient_ranks(tmp_path: Path) -> None:
    """Of layers with different sides, each has a rank of its own."""
    on_it = stirred("mlp")
    x = records_for(BASES["mlp"](), 6).inputs
    on_it.save(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ranks = {name: len(value) for name, value in saved.items() if ".lora_A." in name}
    assert sorted(ranks.values()) == [4, 5] and len(saved) == 4
    with torch.inference_mode():
        loaded = PeftModel.from_pretrained(BASES["mlp"]().module, str(tmp_path / "adapter")).eval()(x)
        torch.testing.assert_close(loaded, on_it.model.eval()(x), rtol=1e-5, atol=1e-6)


def test_without_a_residual_the_folder_holds_the_factors_as_they_are(tmp_path: Path) -> None:
    on_it = LORA_RESIDUAL.attach(BASES["mlp"](), LORA, 0)
    on_it.save(tmp_path / "adapter")
    saved, config = (
        load_file(tmp_path / "adapter" / "adapter_model.safetensors"),
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()),
    )
    assert saved.keys() == on_it.layout.of(LORA_A, LORA_B) and config["r"] == 2 and config["lora_alpha"] == 3.0
    assert all(torch.equal(value, on_it.parameters[name]) for name, value in saved.items())
