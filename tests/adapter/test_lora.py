"""The adapter in a model: where it sits, how it starts, which of its slots train, and its state under names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lalora_flwr.adapter.slots import HEAD, LORA_A, LORA_B, digest
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.base import BaseModel
from tests.adapters import adapter_parameters, adapter_state, factor_of, mask
from tests.reference import CLASSES, adapter, mlp_base, move_off_zero, swin_base, vit_base


def test_a_target_that_matches_nothing_is_refused_and_the_models_layers_are_named() -> None:
    with pytest.raises(ConfigError) as refusal:
        adapter(vit_base(), targets="attn.qkv,query")
    text = str(refusal.value)
    assert "lora.targets" in text and "'query'" in text
    for layer in ("qkv", "proj", "fc1", "fc2"):
        assert layer in text


def test_the_head_is_no_target_and_is_not_offered_as_one() -> None:
    with pytest.raises(ConfigError) as refusal:
        adapter(vit_base(), targets="head")
    assert "head" not in str(refusal.value).partition("it has")[2]


def test_layers_inside_the_head_get_no_adapter_though_their_names_match() -> None:
    def with_head() -> BaseModel:
        body = mlp_base().module
        body.head = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), out=nn.Linear(4, CLASSES)))
        return BaseModel("test/head", body, "head", ("first", "second"), (7,), CLASSES)

    layers = {n.split(".lora_")[0].partition("model.model.")[2] for n in adapter(with_head()).state()}
    assert layers == {"first", "second"}
    trained = adapter(with_head(), head="trained").state()
    assert sum(factor_of(n) == "head" for n in trained) == 4
    with pytest.raises(ConfigError, match=r"lora\.targets"):
        adapter(with_head(), targets="out")


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_the_adapter_of_a_low_precision_base_is_float32(head: str) -> None:
    base = vit_base()
    base.module.bfloat16()
    on_it = adapter(base, head=head)
    own = adapter_parameters(on_it.model)
    for name, p in on_it.model.named_parameters():
        assert p.dtype == (torch.float32 if name in own else torch.bfloat16), name
    assert all(t.dtype == torch.float32 for t in on_it.state().values())


@pytest.mark.parametrize("targets", ["", " ", ",", "kv", "patch_embed.proj", "norm1", "blocks"])
def test_targets_are_whole_names_of_linear_layers(targets: str) -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets"):
        adapter(vit_base(), targets=targets)


def test_targets_of_the_run_or_of_the_model() -> None:
    own = {n.split(".lora_")[0] for n in adapter(vit_base(), targets=" attn.qkv , mlp.fc2").state()}
    assert {n.partition("blocks.")[2] for n in own} == {f"{i}.{t}" for i in (0, 1) for t in ("attn.qkv", "mlp.fc2")}
    auto = {n.split(".lora_")[0].partition("blocks.")[2] for n in adapter(vit_base()).state()}
    assert auto == {f"{i}.{t}" for i in (0, 1) for t in ("attn.qkv", "attn.proj", "mlp.fc1")}


def test_batch_norm_is_refused_by_name() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4)), nn.Linear(4, CLASSES))
    with pytest.raises(ConfigError, match=r"BatchNorm \(1\.1\)"):
        adapter(BaseModel("test/norm", module, "2", ("1.0",), (7,), CLASSES))


def test_at_the_start_b_is_zero_and_a_is_not() -> None:
    state = adapter(vit_base()).state()
    assert all(bool(t.any()) == (factor_of(n) == "A") for n, t in state.items())


def test_the_model_starts_as_its_base_and_then_adds_alpha_over_rank_times_b_a() -> None:
    plain, base = mlp_base().module, mlp_base()
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    on_it = adapter(base, rank=2, alpha=3.0, targets="first")
    torch.testing.assert_close(on_it.model(x), plain(x))
    move_off_zero(on_it.model)
    a, b = on_it.state().values()
    with torch.no_grad():
        plain.first.weight += 3.0 / 2 * b @ a
    torch.testing.assert_close(on_it.model(x), plain(x))


def test_only_the_adapter_trains() -> None:
    for head in ("frozen", "trained"):
        model = adapter(vit_base(), head=head).model
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable == set(adapter_parameters(model))
        assert all(".lora_" in n for n in trainable) == (head == "frozen")


def test_a_is_drawn_from_the_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = adapter(vit_base(), seed=11).state()
    assert torch.equal(torch.rand(3), expected)
    torch.rand(7)
    again, other = adapter(vit_base(), seed=11).state(), adapter(vit_base(), seed=12).state()
    for name in first:
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], other[name]) == (factor_of(name) == "B")


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_state_is_sorted_copies_under_pefts_names(head: str) -> None:
    on_it = adapter(vit_base(), head=head)
    state, peft = on_it.state(), adapter_state(on_it.model)
    assert list(state) == sorted(state) == list(peft)
    assert all(torch.equal(state[name], peft[name]) for name in peft)
    with torch.no_grad():
        for p in on_it.parameters.values():
            p.add_(1.0)
    assert all(torch.equal(state[name], peft[name]) for name in peft)
    assert not any(t.requires_grad for t in state.values())


@pytest.mark.parametrize("base", [vit_base, swin_base, mlp_base])
def test_slots_say_what_each_tensor_is(base: Callable[[], BaseModel]) -> None:
    on_it = adapter(base(), head="trained")
    modules = dict(base().module.named_modules())
    own = list(adapter_parameters(on_it.model).values())
    assert [id(p) for p in on_it.parameters.values()] == [id(p) for p in own]  # in the order of the model
    for name, slot in on_it.layout.items():
        assert slot.name == name and slot.shape == tuple(on_it.parameters[name].shape)
        layer = modules[slot.layer]
        match slot.part:
            case "lora_A":
                assert slot.shape == (2, layer.in_features) and slot.feature_axis == 1
            case "lora_B":
                assert slot.shape == (layer.out_features, 2) and slot.feature_axis == 0
            case part:
                assert part == HEAD and slot.feature_axis is None and slot.layer.startswith("head")
    assert on_it.layout.parts == {LORA_A, LORA_B, HEAD}


def test_a_trained_head_is_part_of_the_adapter_and_a_frozen_one_is_not() -> None:
    trained, frozen = adapter(vit_base(), head="trained").state(), adapter(vit_base()).state()
    extra = {n.rpartition("head.")[2]: tuple(t.shape) for n, t in trained.items() if n not in frozen}
    assert extra == {"weight": (CLASSES, 8), "bias": (CLASSES,)}


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_state_survives_the_way_into_another_model(head: str) -> None:
    source, target = adapter(vit_base(), seed=1, head=head), adapter(vit_base(), seed=2, head=head)
    with torch.no_grad():
        for i, p in enumerate(source.parameters.values()):
            p.add_(1.0 + i)
    target.load(source.state())
    want, got = adapter_parameters(source.model), adapter_parameters(target.model)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[n], got[n]) for n in want)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(source.model(x), target.model(x))


def test_a_part_of_the_state_leaves_the_rest() -> None:
    on_it = adapter(vit_base())
    before = on_it.state()
    name = min(on_it.layout.of(LORA_B))
    on_it.load({name: torch.ones_like(before[name])})
    after = on_it.state()
    assert torch.equal(after.pop(name), torch.ones_like(before[name]))
    assert all(torch.equal(after[n], before[n]) for n in after)


def test_an_unknown_name_is_refused_and_nothing_is_loaded() -> None:
    on_it = adapter(vit_base())
    before = on_it.state()
    name = min(on_it.layout.of(LORA_B))
    with pytest.raises(KeyError, match="typo"):
        on_it.load({name: torch.ones_like(before[name]), name + ".typo": torch.ones(1)})
    assert digest(on_it.state()) == digest(before)


def test_head_tensors_are_unknown_to_an_adapter_with_a_frozen_head() -> None:
    with pytest.raises(KeyError):
        adapter(vit_base()).load(adapter(vit_base(), head="trained").state())


def test_a_corner_of_the_factors_is_an_adapter_of_lower_rank() -> None:
    """What a weaker site holds: the first rows of A and columns of B, under the scaling of the whole."""
    whole, corner = adapter(mlp_base(), rank=3), adapter(mlp_base(), rank=3)
    move_off_zero(whole.model)
    held = whole.layout.resized(LORA_A, axis=0, size=2).resized(LORA_B, axis=1, size=2)
    state = whole.state()
    cut = {name: state[name][tuple(slice(n) for n in slot.shape)] for name, slot in held.items()}
    corner.load(cut)
    zeros = {name: torch.zeros_like(state[name]) for name in state}
    for name, value in cut.items():
        zeros[name][tuple(slice(n) for n in value.shape)] = value
    whole.load(zeros)
    x = torch.randn(4, 7)
    torch.testing.assert_close(corner.model(x), whole.model(x))
    assert [tuple(p.shape) for p in corner.parameters.values()] == [slot.shape for slot in held.values()]
    corner.load(state)
    assert digest(corner.state()) == digest(state)


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("factors", ["A", "B", "AB", ""])
def test_exactly_the_active_slots_require_gradients(factors: str, head: str) -> None:
    on_it = adapter(vit_base(), head=head)
    for p in on_it.parameters.values():
        p.grad = torch.ones_like(p)
    wanted = mask(on_it.layout, factors)
    active = on_it.activate(wanted)
    assert list(active) == [name for name in on_it.layout if name in wanted]
    assert all(active[name] is on_it.parameters[name] for name in active)
    training = {id(p) for p in on_it.model.parameters() if p.requires_grad}
    assert training == {id(p) for p in active.values()}
    assert all(p.grad is None for p in on_it.model.parameters())


def test_digest_changes_with_any_value_shape_type_or_name() -> None:
    state = adapter(vit_base(), head="trained").state()
    whole = digest(state)
    assert digest(dict(reversed(state.items()))) == whole
    for name, tensor in state.items():
        nudged = tensor.clone()
        nudged.view(-1)[-1] += 1e-3
        changes = [nudged, tensor.double(), tensor.reshape(1, *tensor.shape)]
        assert all(digest({**state, name: t}) != whole for t in changes), name
        rest = {n: t for n, t in state.items() if n != name}
        assert digest(rest) != whole
        assert digest({**rest, name + "x": tensor}) != whole
