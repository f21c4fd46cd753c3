"""Dropout, checkpointing, low precision, and a model that is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.adapters import adapter_parameters, engine_for, set_active
from tests.gradients.layers import RECORDS, compare
from tests.reference import (
    BASES,
    adapted,
    assert_same_gradients,
    double_pair,
    generator,
    move_off_zero,
    one_by_one,
    records_for,
)


@pytest.mark.parametrize("factors", ["A", "B", "AB"])
@pytest.mark.parametrize("kind", ["mlp", "vit", "swin"])
def test_the_same_with_dropout_on(kind: str, factors: str) -> None:
    """Dropout takes another way through an adapted layer. At this rate it drops nothing."""
    base = BASES[kind]()
    model = adapted(base, dropout=1e-12)
    move_off_zero(model)
    for module in model.modules():  # only dropout: Swin also draws which paths to drop
        module.training = isinstance(module, nn.Dropout)
    set_active(model, frozenset(factors))
    data = records_for(base, RECORDS)
    labels = data.labels
    compare(model, lambda m, x: F.cross_entropy(m(x), labels[: len(x)] * 0, reduction="none"), data.inputs)


def test_dropout_is_drawn_in_training_mode_and_not_in_evaluation_mode() -> None:
    base = BASES["mlp"]()
    model = adapted(base, dropout=0.5)
    move_off_zero(model)
    engine = engine_for(model)
    data = records_for(base, RECORDS)

    def gradients() -> list[Tensor]:
        return list(engine(RECORDS, lambda: base.losses(model, data.inputs, data.labels)).values())

    for training in (True, False):
        model.train(training)
        same = all(map(torch.equal, gradients(), gradients()))
        assert same != training


def test_two_layers_that_share_a_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    compare(model, lambda m, x: m(x).square().sum(1), torch.randn(RECORDS, 4, generator=generator()))


@pytest.mark.parametrize("trained", ["weight", "bias", "both"])
def test_weight_and_bias_train_together_or_alone(trained: str) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(trained != "bias")
    model[2].bias.requires_grad_(trained != "weight")
    x = torch.randn(RECORDS, 6, 3, generator=generator())
    gradients = compare(model, lambda m, x: m(x).square().flatten(1).sum(1), x)
    assert len(gradients) == (2 if trained == "both" else 1)


def checkpointed(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False).square().sum(1)


def test_linear_layers_under_gradient_checkpointing() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    compare(model, checkpointed, torch.randn(RECORDS, 3, generator=generator()))


@pytest.mark.parametrize("factors", ["A", "B", "AB"])
def test_adapters_under_gradient_checkpointing(factors: str) -> None:
    model = adapted(BASES["mlp"]())
    move_off_zero(model)
    set_active(model, frozenset(factors))
    compare(model, checkpointed, torch.randn(RECORDS, 7, generator=generator()))


@pytest.mark.parametrize("dropout", [0.0, 1e-12])
@pytest.mark.parametrize("factors", ["A", "B", "AB"])
def test_a_low_precision_base_gives_float32_gradients_near_the_exact_ones(factors: str, dropout: float) -> None:
    base = BASES["vit"]()
    model = adapted(base, dropout=dropout).train()
    move_off_zero(model)
    _, plain = double_pair(copy.deepcopy(model))
    adapter = adapter_parameters(model)
    for name, p in model.named_parameters():
        if name not in adapter:
            p.data = p.data.bfloat16()
    set_active(model, frozenset(factors))
    set_active(plain, frozenset(factors))
    data = records_for(base, RECORDS)
    inputs = data.inputs.bfloat16()

    fast = engine_for(model)(RECORDS, lambda: base.losses(model, inputs, data.labels).float())
    wide = inputs.double()
    slow = one_by_one(plain, lambda m, j: base.losses(m, wide[j : j + 1], data.labels[j : j + 1]).sum(), RECORDS)
    assert all(g.dtype == torch.float32 for g in fast.values())
    assert_same_gradients({n: g.double() for n, g in fast.items()}, slow, tolerance=0.05)


def test_a_parameter_that_no_loss_depends_on_has_zero_gradients() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    other = torch.ones(1).requires_grad_()
    gradients = engine_for(model)(2, lambda: (model(torch.ones(2, 3)).detach() + other)[:, 0])
    assert [tuple(g.shape) for g in gradients.values()] == [(2, 3, 3), (2, 3)]
    assert not any(g.any() for g in gradients.values())


def test_a_call_leaves_no_gradient_and_the_model_as_it_was() -> None:
    base = BASES["vit"]()
    model = adapted(base, head="trained")
    move_off_zero(model)
    plain = copy.deepcopy(model)
    data = records_for(base, RECORDS)
    engine = engine_for(model)
    engine(RECORDS, lambda: base.losses(model, data.inputs, data.labels))

    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model(data.inputs[:3]), plain(data.inputs[:3]))  # 3 is not a multiple of 4: no pass is open
    assert list(model.state_dict()) == list(plain.state_dict())
    for m in (model, plain):
        base.losses(m, data.inputs, data.labels).sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad
        assert not p.requires_grad or torch.equal(p.grad, q.grad)


def test_a_failed_call_leaves_the_ordinary_forward() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        engine_for(model)(2, lambda: model(torch.ones(2, 3)).sum())
    assert model(torch.ones(5, 3)).requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_values_changed_between_calls_are_seen() -> None:
    model = nn.Sequential(nn.Linear(3, 1, bias=False)).double()
    engine = engine_for(model)
    x = torch.randn(2, 3, generator=generator()).double()
    for scale in (1.0, 2.0):
        with torch.no_grad():
            model[0].weight.fill_(scale)
        (gradient,) = engine(2, lambda: model(x).square()[:, 0]).values()
        torch.testing.assert_close(gradient[:, 0], 2 * scale * x.sum(1, keepdim=True) * x)


def test_of_two_engines_on_one_model_the_newer_works_and_the_older_refuses() -> None:
    base = BASES["mlp"]()
    model = adapted(base)
    move_off_zero(model)
    data = records_for(base, RECORDS)
    model, plain = double_pair(model)
    older, newer = engine_for(model), engine_for(model)
    inputs = data.inputs.double()
    slow = one_by_one(plain, lambda m, j: base.losses(m, inputs[j : j + 1], data.labels[j : j + 1]).sum(), RECORDS)
    assert_same_gradients(newer(RECORDS, lambda: base.losses(model, inputs, data.labels)), slow)
    with pytest.raises(RuntimeError):
        older(RECORDS, lambda: base.losses(model, inputs, data.labels))
