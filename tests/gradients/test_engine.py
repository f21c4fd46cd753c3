"""Every test compares with, or relies on, the naive reference: one record at a time through an untouched copy."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.base import BaseModel
from tests.adapters import adapter_parameters, engine_for, set_active
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

RECORDS = 4


def compare(model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], inputs: Tensor) -> dict[str, Tensor]:
    """Check the engine on a float64 model against the loop; ``loss`` maps (n, …) inputs to (n,) losses."""
    model, plain = double_pair(model)
    inputs = inputs.double()
    fast = engine_for(model)(len(inputs), lambda: loss(model, inputs))
    slow = one_by_one(plain, lambda m, j: loss(m, inputs[j : j + 1]).sum(), len(inputs))
    assert_same_gradients(fast, slow)
    return fast


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("factors", ["A", "B", "AB"])
@pytest.mark.parametrize("kind", ["mlp", "vit", "swin"])
def test_adapter_gradients_are_those_of_single_records(kind: str, factors: str, head: str) -> None:
    base = BASES[kind]()
    model = adapted(base, head=head)
    move_off_zero(model)
    data = records_for(base, RECORDS)
    model, plain = double_pair(model)
    engine = engine_for(model)
    active = set_active(model, frozenset(factors))
    set_active(plain, frozenset(factors))
    inputs = data.inputs.double()

    fast = engine(RECORDS, lambda: base.losses(model, inputs, data.labels))
    slow = one_by_one(plain, lambda m, j: base.losses(m, inputs[j : j + 1], data.labels[j : j + 1]).sum(), RECORDS)

    assert list(fast) == list(active)
    assert_same_gradients(fast, slow)
    assert any("modules_to_save" in name for name in fast) == (head == "trained")
    assert all(float(g.abs().max()) > 0 for g in fast.values())


def test_one_engine_follows_the_active_factors() -> None:
    base = BASES["vit"]()
    model = adapted(base)
    move_off_zero(model)
    data = records_for(base, RECORDS)
    model, plain = double_pair(model)
    engine = engine_for(model)
    inputs = data.inputs.double()
    for factors in ("B", "A", "AB", "B"):
        set_active(model, frozenset(factors))
        set_active(plain, frozenset(factors))
        fast = engine(RECORDS, lambda: base.losses(model, inputs, data.labels))
        slow = one_by_one(plain, lambda m, j: base.losses(m, inputs[j : j + 1], data.labels[j : j + 1]).sum(), RECORDS)
        assert_same_gradients(fast, slow)


class Windows(nn.Module):
    """Low rank, with a bias; the windows of a record lie next to each other in the first axis, as in Swin."""

    def __init__(self, features: int, rank: int, out: int, windows: int, seed: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(features, rank, bias=False), nn.Linear(rank, out)
        self.windows = windows
        draw = generator(seed)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=draw))

    def forward(self, x: Tensor) -> Tensor:  # (records, windows, *tokens, features)
        folded = x.reshape(x.shape[0] * self.windows, *x.shape[2:])
        y = self.up(torch.tanh(self.down(folded)))
        return y.reshape(x.shape[0], self.windows, *y.shape[1:])


SHAPES = {
    "records": st.integers(1, 5),
    "windows": st.integers(1, 4),
    "tokens": st.lists(st.integers(1, 4), max_size=2),
    "features": st.integers(1, 6),
    "rank": st.integers(1, 4),
    "out": st.integers(1, 6),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=80, deadline=None)
@given(**SHAPES, frozen=st.sampled_from(["", "down.weight", "up.weight", "up.bias"]))
def test_linear_layers_of_any_shape_rank_batch_and_number_of_windows(
    records: int, windows: int, tokens: list[int], features: int, rank: int, out: int, seed: int, frozen: str
) -> None:
    model = Windows(features, rank, out, windows, seed)
    for name, p in model.named_parameters():
        p.requires_grad_(name != frozen)
    x = torch.randn(records, windows, *tokens, features, generator=generator(seed))
    compare(model, lambda m, x: m(x).sin().flatten(1).sum(1), x)


@settings(max_examples=60, deadline=None)
@given(**SHAPES, factors=st.sampled_from(["A", "B", "AB"]))
def test_adapters_of_any_shape_rank_batch_and_number_of_windows(
    records: int, windows: int, tokens: list[int], features: int, rank: int, out: int, seed: int, factors: str
) -> None:
    base = BaseModel("test/windows", Windows(features, 5, out, windows, seed), "", ("down", "up"), (), 1)
    model = adapted(base, rank=rank)
    move_off_zero(model)
    set_active(model, frozenset(factors))
    x = torch.randn(records, windows, *tokens, features, generator=generator(seed))
    compare(model, lambda m, x: m(x).sin().flatten(1).sum(1), x)


@settings(max_examples=40, deadline=None)
@given(
    records=st.integers(1, 4),
    axes=st.lists(st.integers(1, 4), max_size=2),
    features=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_inputs_of_two_three_and_four_axes(records: int, axes: list[int], features: int, seed: int) -> None:
    x = torch.randn(records, *axes, features, generator=generator(seed))
    compare(nn.Sequential(nn.Linear(features, 3)), lambda m, x: m(x).square().flatten(1).sum(1), x)


@pytest.mark.parametrize("factors", ["A", "B", "AB"])
def test_inputs_and_output_gradients_that_are_not_contiguous(factors: str) -> None:
    base = BaseModel("test/windows", Windows(3, 5, 2, 4, seed=0), "", ("down", "up"), (), 1)
    model = adapted(base)
    move_off_zero(model)
    set_active(model, frozenset(factors))
    x = torch.randn(3, 2, 4, RECORDS, generator=generator()).permute(3, 2, 1, 0)  # (records, windows, tokens, features)
    compare(model, lambda m, x: m(x).permute(0, 3, 1, 2).flatten(1).sum(1), x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


def test_gradients_of_a_layer_called_twice_add_up() -> None:
    compare(Twice(), lambda m, x: m(x).square().sum(1), torch.randn(RECORDS, 4, generator=generator()))


@pytest.mark.parametrize("factors", ["A", "B", "AB"])
def test_gradients_of_an_adapted_layer_called_twice_add_up(factors: str) -> None:
    model = adapted(BaseModel("test/twice", Twice(), "", ("layer",), (4,), 4))
    move_off_zero(model)
    set_active(model, frozenset(factors))
    compare(model, lambda m, x: m(x).square().sum(1), torch.randn(RECORDS, 4, generator=generator()))


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


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_trainable_parameter_outside_the_forward_pass_is_refused_by_name() -> None:
    model = Unused()
    with pytest.raises(RuntimeError, match=r"spare\.weight"):
        engine_for(model)(2, lambda: model(torch.ones(2, 3)).sum(1))


def test_a_parameter_that_is_neither_frozen_nor_trained_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(ConfigError, match=r"1\.weight: not frozen"):
        PerSampleGradients(model, dict(model[0].named_parameters()))


@pytest.mark.parametrize("shape", [(), (3,), (1,), (2, 1), (2, 3)])
def test_losses_that_are_not_one_a_record_are_refused(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="for 2 records"):
        engine_for(model)(2, lambda: model(torch.ones(2, 3)).sum() * torch.ones(shape))


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_first_axis_of_an_adapted_layer_that_is_no_multiple_of_the_records_is_refused(rows: int) -> None:
    model = adapted(BASES["mlp"]())
    with pytest.raises(RuntimeError, match=f"{rows} rows for 2 records"):
        engine_for(model)(2, lambda: model(torch.ones(rows, 7)).sum().expand(2))


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_first_axis_that_is_no_multiple_of_the_records_is_refused(rows: int) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match=f"{rows} rows for 2 records"):
        engine_for(model)(2, lambda: model(torch.ones(rows, 3)).sum().expand(2))


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs(), self.bias)


@pytest.mark.parametrize(
    "layer",
    [nn.LayerNorm(3), nn.Conv2d(3, 3, 1), nn.Embedding(3, 3), OwnLinear(3, 3), nn.PReLU()],
    ids=lambda m: type(m).__name__,
)
def test_a_trainable_layer_without_a_rule_is_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(ConfigError, match=rf"1\.weight.*{type(layer).__name__}"):
        engine_for(nn.Sequential(nn.Linear(3, 3), layer))


def test_a_frozen_layer_of_any_kind_is_fine() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3).requires_grad_(False), OwnLinear(3, 3).requires_grad_(False))
    compare(model, lambda m, x: m(x).square().sum(1), torch.randn(RECORDS, 3, generator=generator()))
