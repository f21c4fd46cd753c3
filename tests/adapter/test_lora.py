from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from lalora_flwr.adapter.lora import (
    adapter_parameters,
    adapter_state,
    digest,
    factor_of,
    load_adapter_state,
    select,
    set_active,
)
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.base import BaseModel
from tests.reference import CLASSES, adapted, mlp_base, move_off_zero, vit_base

AB = frozenset("AB")
WHOLE = AB | {"head"}


def test_a_target_that_matches_nothing_is_refused_and_the_models_layers_are_named() -> None:
    with pytest.raises(ConfigError) as refusal:
        adapted(vit_base(), targets="attn.qkv,query")
    text = str(refusal.value)
    assert "lora.targets" in text and "'query'" in text
    for layer in ("qkv", "proj", "fc1", "fc2"):
        assert layer in text


def test_the_head_is_no_target_and_is_not_offered_as_one() -> None:
    with pytest.raises(ConfigError) as refusal:
        adapted(vit_base(), targets="head")
    assert "head" not in str(refusal.value).partition("it has")[2]


def test_layers_inside_the_head_get_no_adapter_though_their_names_match() -> None:
    def with_head() -> BaseModel:
        body = mlp_base().module
        body.head = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), out=nn.Linear(4, CLASSES)))
        return BaseModel("test/head", body, "head", ("first", "second"), (7,), CLASSES)

    layers = {n.split(".lora_")[0].partition("model.model.")[2] for n in adapter_state(adapted(with_head()))}
    assert layers == {"first", "second"}
    trained = adapter_state(adapted(with_head(), head="trained"))
    assert sum(factor_of(n) == "head" for n in trained) == 4
    with pytest.raises(ConfigError, match=r"lora\.targets"):
        adapted(with_head(), targets="out")


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_the_adapter_of_a_low_precision_base_is_float32(head: str) -> None:
    base = vit_base()
    base.module.bfloat16()
    model = adapted(base, head=head)
    adapter = adapter_parameters(model)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if name in adapter else torch.bfloat16), name
    assert all(t.dtype == torch.float32 for t in adapter_state(model).values())


@pytest.mark.parametrize("targets", ["", " ", ",", "kv", "patch_embed.proj", "norm1", "blocks"])
def test_targets_are_whole_names_of_linear_layers(targets: str) -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets"):
        adapted(vit_base(), targets=targets)


def test_targets_of_the_run_or_of_the_model() -> None:
    own = {n.split(".lora_")[0] for n in adapter_state(adapted(vit_base(), targets=" attn.qkv , mlp.fc2"))}
    assert {n.partition("blocks.")[2] for n in own} == {f"{i}.{t}" for i in (0, 1) for t in ("attn.qkv", "mlp.fc2")}
    auto = {n.split(".lora_")[0].partition("blocks.")[2] for n in adapter_state(adapted(vit_base()))}
    assert auto == {f"{i}.{t}" for i in (0, 1) for t in ("attn.qkv", "attn.proj", "mlp.fc1")}


def test_batch_norm_is_refused_by_name() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4)), nn.Linear(4, CLASSES))
    with pytest.raises(ConfigError, match=r"BatchNorm \(1\.1\)"):
        adapted(BaseModel("test/norm", module, "2", ("1.0",), (7,), CLASSES))


def test_at_the_start_b_is_zero_and_a_is_not() -> None:
    state = adapter_state(adapted(vit_base()))
    assert all(bool(t.any()) == (factor_of(n) == "A") for n, t in state.items())


def test_the_model_starts_as_its_base_and_then_adds_alpha_over_rank_times_b_a() -> None:
    plain, base = mlp_base().module, mlp_base()
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    model = adapted(base, rank=2, alpha=3.0, targets="first")
    torch.testing.assert_close(model(x), plain(x))
    move_off_zero(model)
    a, b = adapter_state(model).values()
    with torch.no_grad():
        plain.first.weight += 3.0 / 2 * b @ a
    torch.testing.assert_close(model(x), plain(x))


def test_only_the_adapter_trains() -> None:
    for head in ("frozen", "trained"):
        model = adapted(vit_base(), head=head)
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable == set(adapter_parameters(model))
        assert all(".lora_" in n for n in trainable) == (head == "frozen")


def test_a_is_drawn_from_the_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = adapter_state(adapted(vit_base(), seed=11))
    assert torch.equal(torch.rand(3), expected)
    torch.rand(7)
    again, other = adapter_state(adapted(vit_base(), seed=11)), adapter_state(adapted(vit_base(), seed=12))
    for name in first:
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], other[name]) == (factor_of(name) == "B")


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_state_is_sorted_copies_under_one_naming(head: str) -> None:
    model = adapted(vit_base(), head=head)
    state = adapter_state(model)
    assert list(state) == sorted(state)
    assert len(state) == len(adapter_parameters(model))
    assert [n.replace(".lora_A.", ".?.").replace(".lora_B.", ".?.") for n in state if ".default" in n] == []
    kept = {name: t.clone() for name, t in state.items()}
    with torch.no_grad():
        for p in adapter_parameters(model).values():
            p.add_(1.0)
    assert all(torch.equal(state[n], kept[n]) for n in kept)
    assert not any(t.requires_grad for t in state.values())


def test_a_trained_head_is_part_of_the_adapter_and_a_frozen_one_is_not() -> None:
    trained, frozen = adapter_state(adapted(vit_base(), head="trained")), adapter_state(adapted(vit_base()))
    extra = {n.rpartition("head.")[2]: tuple(t.shape) for n, t in trained.items() if n not in frozen}
    assert extra == {"weight": (CLASSES, 8), "bias": (CLASSES,)}


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_state_survives_the_way_into_another_model(head: str) -> None:
    source, target = adapted(vit_base(), seed=1, head=head), adapted(vit_base(), seed=2, head=head)
    with torch.no_grad():
        for i, p in enumerate(adapter_parameters(source).values()):
            p.add_(1.0 + i)
    load_adapter_state(target, adapter_state(source))
    want, got = adapter_parameters(source), adapter_parameters(target)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[n], got[n]) for n in want)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(source(x), target(x))


def test_a_part_of_the_state_leaves_the_rest() -> None:
    model = adapted(vit_base())
    before = adapter_state(model)
    name = next(n for n in before if factor_of(n) == "B")
    load_adapter_state(model, {name: torch.ones_like(before[name])})
    after = adapter_state(model)
    assert torch.equal(after.pop(name), torch.ones_like(before[name]))
    assert all(torch.equal(after[n], before[n]) for n in after)


def test_an_unknown_name_is_refused_and_nothing_is_loaded() -> None:
    model = adapted(vit_base())
    before = adapter_state(model)
    name = next(n for n in before if factor_of(n) == "B")
    with pytest.raises(KeyError, match="typo"):
        load_adapter_state(model, {name: torch.ones_like(before[name]), name + ".typo": torch.ones(1)})
    assert digest(adapter_state(model)) == digest(before)


def test_head_tensors_are_unknown_to_an_adapter_with_a_frozen_head() -> None:
    with pytest.raises(KeyError):
        load_adapter_state(adapted(vit_base()), adapter_state(adapted(vit_base(), head="trained")))


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("base_model.model.blocks.0.attn.qkv.lora_A.weight", "A"),
        ("base_model.model.blocks.0.attn.qkv.lora_B.default.weight", "B"),
        ("base_model.model.head.weight", "head"),
        ("base_model.model.head.modules_to_save.default.bias", "head"),
    ],
)
def test_factor_of_a_name(name: str, factor: str) -> None:
    assert factor_of(name) == factor


def test_select_keeps_the_order_and_always_the_head() -> None:
    names = ["x.lora_B.w", "head.weight", "x.lora_A.w", "y.lora_A.w"]
    assert select(names, frozenset("A")) == ["head.weight", "x.lora_A.w", "y.lora_A.w"]
    assert select(names, frozenset("B")) == ["x.lora_B.w", "head.weight"]
    assert select(names, AB) == names
    assert select(names, frozenset()) == ["head.weight"]


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("factors", ["A", "B", "AB", ""])
def test_exactly_the_active_factors_and_a_trained_head_require_gradients(factors: str, head: str) -> None:
    model = adapted(vit_base(), head=head)
    for p in adapter_parameters(model).values():
        p.grad = torch.ones_like(p)
    active = set_active(model, frozenset(factors))
    for name, p in model.named_parameters():
        wanted = name in adapter_parameters(model) and factor_of(name) in {*factors, "head"}
        assert p.requires_grad == wanted, name
        assert (name in active) == wanted
        assert p.grad is None
    assert all(active[n] is dict(model.named_parameters())[n] for n in active)


def test_digest_changes_with_any_value_shape_type_or_name() -> None:
    state = adapter_state(adapted(vit_base(), head="trained"))
    whole = digest(state, WHOLE)
    assert digest(dict(reversed(state.items())), WHOLE) == whole
    for name, tensor in state.items():
        nudged = tensor.clone()
        nudged.view(-1)[-1] += 1e-3
        changes = [nudged, tensor.double(), tensor.reshape(1, *tensor.shape)]
        assert all(digest({**state, name: t}, WHOLE) != whole for t in changes), name
        rest = {n: t for n, t in state.items() if n != name}
        assert digest(rest, WHOLE) != whole
        assert digest({**rest, name + "x": tensor}, WHOLE) != whole


def test_digest_of_some_factors_looks_at_those_alone() -> None:
    state = adapter_state(adapted(vit_base(), head="trained"))
    for name, tensor in state.items():
        changed = {**state, name: tensor + 1}
        for factors in (frozenset("A"), frozenset("B"), AB, WHOLE):
            assert (digest(changed, factors) != digest(state, factors)) == (factor_of(name) in factors)
