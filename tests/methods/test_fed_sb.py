"""Fed-SB: a core between fixed factors, exact per record, exact in the mean, and plain LoRA when it is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from lalora_flwr.adapter.lora_sb import GRID, LORA_R, LORA_SB
from lalora_flwr.adapter.slots import LORA_A, LORA_B, Layout
from lalora_flwr.engines.inline import run_inline
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.gradients.self_check import self_check
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.embedded import build_vit_digits
from lalora_flwr.server.plan import make_plan
from lalora_flwr.settings import LoraSettings
from tests.conftest import Finished, arrays_of, small
from tests.reference import BASES, assert_same_gradients, generator, one_by_one, records_for
from tests.server.test_outputs import public_test_part
from tests.server.test_resume import killed_after, result, resumed
from tests.sites import servers_learner

LORA = LoraSettings(rank=2, alpha=3.0)


def by_layer(layout: Layout) -> dict[str, dict[str, str]]:
    layers: dict[str, dict[str, str]] = {}
    for name, slot in layout.items():
        layers.setdefault(slot.layer, {})[slot.part] = name
    return {layer: own for layer, own in layers.items() if LORA_R in own}


class Plain(nn.Module):
    """A linear layer in float64 with B R A beside it, in the paper's words."""

    def __init__(self, base: nn.Linear, A: torch.Tensor, R: torch.Tensor, B: torch.Tensor) -> None:
        super().__init__()
        self.base, self.scale = base, LORA.alpha / LORA.rank
        self.A, self.B, self.R = A.double(), B.double(), nn.Parameter(R.detach().double().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * (x @ self.A.T @ self.R.T @ self.B.T)


@pytest.mark.parametrize("kind", sorted(BASES))
def test_the_gradients_of_the_cores_are_those_of_single_records(kind: str) -> None:
    base, naive = BASES[kind](), BASES[kind]().module.double().requires_grad_(False)
    base.module.double()
    adapter = LORA_SB.attach(base, LORA, 0)
    records = records_for(base, 5)
    engine = PerSampleGradients(adapter.model, adapter.parameters)
    self_check(base, adapter, engine)
    adapter.model.double()
    cores = by_layer(adapter.layout)
    for own in cores.values():
        adapter.parameters[own[LORA_R]].data.normal_(generator=generator(3))
    for layer, own in cores.items():
        parent, _, name = layer.rpartition(".")
        values = (adapter.parameters[own[part]].data for part in (LORA_A, LORA_R, LORA_B))
        linear = naive.get_submodule(layer)
        assert isinstance(linear, nn.Linear)
        setattr(naive.get_submodule(parent), name, Plain(linear, *values))
    assert adapter.trainable == adapter.layout.of(LORA_R)
    adapter.activate(adapter.trainable)
    x, y = records.inputs.double(), records.labels
    fast = engine(len(y), lambda: nn.functional.cross_entropy(adapter.model(x), y, reduction="none"))

    def alone(model: nn.Module, j: int) -> torch.Tensor:
        return nn.functional.cross_entropy(model(x[j : j + 1]), y[j : j + 1])

    slow = {cores[name.removesuffix(".R")][LORA_R]: value for name, value in one_by_one(naive, alone, len(y)).items()}
    assert_same_gradients(fast, slow)


def test_the_fixed_factors_are_orthonormal_and_follow_from_the_seed() -> None:
    one, same, other = (LORA_SB.attach(BASES["vit"](), LORA, seed).state() for seed in (1, 1, 2))
    layout = LORA_SB.attach(BASES["vit"](), LORA, 1).layout
    for own in by_layer(layout).values():
        A, B, R = (one[own[part]] for part in (LORA_A, LORA_B, LORA_R))
        torch.testing.assert_close(A @ A.T, torch.eye(2), atol=1e-4, rtol=0)
        torch.testing.assert_close(B.T @ B, torch.eye(2), atol=1e-4, rtol=0)
        assert R.shape == (2, 2) and not R.any() and not torch.equal(A, other[own[LORA_A]])
    assert all(torch.equal(one[name], same[name]) for name in one)


def test_the_fixed_factors_lie_on_a_grid_that_hides_a_machines_last_digits() -> None:
    """Sites derive them instead of getting them, and compare digests; decompositions differ by far less than half a step."""
    adapter = LORA_SB.attach(BASES["mlp"](), LORA, 0)
    for name in adapter.layout.of(LORA_A, LORA_B):
        steps = adapter.parameters[name].detach().double() / GRID
        assert torch.equal(steps, steps.round()) and steps.any()


def test_only_cores_and_the_head_travel_and_the_mean_is_the_mean_of_the_products(finished: Callable[..., Finished]) -> None:
    done = finished(strategy="fed-sb", lora__head="trained", num_rounds=3)
    initial, layers = servers_learner(done.settings).initial, by_layer(servers_learner(done.settings).adapter.layout)
    exchanged, after = done.spy.training(2), arrays_of(done.spy.training(3)[0][0])
    fixed = {own[part] for own in layers.values() for part in (LORA_A, LORA_B)}
    assert fixed and all(arrays_of(message).keys() == initial.keys() - fixed for pair in exchanged for message in pair)
    assert all(torch.equal(done.checkpoint[name], initial[name]) for name in fixed)
    for own in layers.values():
        A, B = initial[own[LORA_A]].double(), initial[own[LORA_B]].double()
        products = [B @ arrays_of(reply)[own[LORA_R]].double() @ A for _, reply in exchanged]
        torch.testing.assert_close(B @ after[own[LORA_R]].double() @ A, torch.stack(products).mean(0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_stock_peft_loads_what_the_run_saved(head: str, finished: Callable[..., Finished]) -> None:
    done = finished(strategy="fed-sb", lora__head=head, num_rounds=3, lora__rank=16, train__lr=5.0)
    images, labels = public_test_part()
    with torch.inference_mode():
        logits = PeftModel.from_pretrained(build_vit_digits(), str(done.path / "adapter")).eval()(images)
    assert done.summary["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()), abs=1e-6)
    assert done.summary["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-4)
    assert done.summary["loss"] != pytest.approx(done.summary["frozen_loss"], rel=1e-3)


def test_it_goes_on_after_a_death(tmp_path: Path, finished: Callable[..., Finished]) -> None:
    killed_after(small(tmp_path, strategy="fed-sb", lora__head="trained", num_rounds=3), 2)
    run_inline(resumed(tmp_path, strategy="fed-sb", lora__head="trained", num_rounds=3))
    assert result(tmp_path / "run") == result(finished(strategy="fed-sb", lora__head="trained", num_rounds=3).path)


def test_a_schedule_of_factors_is_refused_since_none_of_them_trains(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.schedule = 'B': the form trains no lora_B; take 'both'"):
        make_plan(small(tmp_path, strategy="fed-sb", lora__schedule="B"))
