"""Frozen layers in four bits: their bits by the table of the paper, what keeps its precision, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.architectures import build, build_wide
from lalora_flwr.data.data_set import Facts
from lalora_flwr.gradients.precision import full_precision
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models import load_base_model
from lalora_flwr.models.base import BaseModel
from lalora_flwr.models.four_bits import BLOCK, FourBitLinear, frozen_product, in_four_bits, unpacked
from lalora_flwr.settings import ModelSettings
from lalora_flwr.training.learner import cast_base
from tests.models.folders import save_hf

CPU = torch.device("cpu")
NF4 = (  # arXiv 2305.14314, appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def by_hand(weight: Tensor) -> Tensor:
    """Each weight as the nearest number of the table times the largest of its block, in float32."""
    blocks = weight.float().reshape(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    table = torch.tensor(NF4)
    nearest = (blocks.div(scales).unsqueeze(2) - table).abs().argmin(2)
    return (table[nearest] * scales).reshape(weight.shape)


def layer(outputs: int, inputs: int, dtype: torch.dtype = torch.float32, *, bias: bool = True) -> FourBitLinear:
    made = nn.Linear(inputs, outputs, bias, dtype=dtype).requires_grad_(False)
    base = in_four_bits(BaseModel("test", nn.Sequential(made), "", (), (), 0))
    assert isinstance(base.module[0], FourBitLinear)
    return base.module[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 64), (128, 192), (64, 1536), (33, 320)])
def test_the_bits_are_those_of_the_table(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    made = nn.Linear(shape[1], shape[0], dtype=dtype)
    published = made.weight.detach().clone()
    packed = in_four_bits(BaseModel("test", nn.Sequential(made), "", (), (), 0)).module[0].float()
    assert packed.weight.shape == published.shape and packed.packed.numel() == published.numel() / 2
    assert torch.equal(packed.weight, by_hand(published))
    assert torch.equal(packed.bfloat16().weight, by_hand(published).bfloat16())
    assert 0.05 < float((packed.weight - published).norm() / published.float().norm()) < 0.12


def test_no_cast_changes_the_bits() -> None:
    packed = layer(96, 128)
    before = {name: value.clone() for name, value in packed.state_dict().items()}
    wide = packed.weight
    packed.bfloat16()
    with full_precision(packed):
        assert packed.weight.dtype == torch.float32 and torch.equal(packed.weight, wide)
    assert packed.weight.dtype == torch.bfloat16
    packed.half().double()
    assert packed.weight.dtype == torch.float64 and torch.equal(packed.float().weight, wide)
    for name in ("packed", "scales"):
        assert torch.equal(packed.state_dict()[name], before[name])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(5,), (2, 3), ()])
def test_products_and_their_derivatives_are_those_of_the_weight(rows: tuple[int, ...], bias: bool) -> None:
    packed = layer(48, 64, bias=bias).double()
    plain = nn.Linear(64, 48, bias).double().requires_grad_(False)
    plain.weight.copy_(packed.weight)
    if bias:
        plain.bias.copy_(packed.bias)
    x = torch.randn(*rows, 64, dtype=torch.float64, requires_grad=True)
    found = []
    for one in (packed, plain):
        y = one(x).square().sum()
        (slope,) = torch.autograd.grad(y, x, create_graph=True)
        (bent,) = torch.autograd.grad(slope.pow(3).sum(), x)
        found.append((y, slope, bent))
    assert all(torch.allclose(one, other, rtol=1e-12) for one, other in zip(*found, strict=True))


def test_a_bias_that_trains_gets_its_gradient() -> None:
    packed = layer(48, 64).double()
    packed.bias.requires_grad_()
    x = torch.randn(5, 64, dtype=torch.float64)
    (found,) = torch.autograd.grad(packed(x).sum(), packed.bias)
    assert torch.equal(found, torch.full((48,), 5.0, dtype=torch.float64))


def test_no_whole_weight_is_kept_for_the_backward_pass() -> None:
    packed = layer(256, 256)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    x = torch.randn(2, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        frozen_product(x, packed, packed.bias)
    assert not [size for size in kept if size >= 256 * 256 / 2]


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_a_plain_one_again_with_the_weights_that_it_had(bias: bool) -> None:
    packed = layer(48, 64, bias=bias)
    x = torch.randn(5, 64)
    wanted, weight = packed(x), packed.weight
    unpacked(packed)
    assert type(packed) is nn.Linear and torch.equal(packed.weight, weight) and not packed.weight.requires_grad
    assert set(packed.state_dict()) == ({"weight", "bias"} if bias else {"weight"})
    assert torch.allclose(packed(x), wanted, rtol=1e-5, atol=1e-6)


def names(module: nn.Module) -> tuple[set[str], set[str]]:
    """Of the layers in four bits, and of the other linear ones."""
    four = {name for name, part in module.named_modules() if isinstance(part, FourBitLinear)}
    return four, {name for name, part in module.named_modules() if isinstance(part, nn.Linear)} - four


def test_heads_and_the_layer_that_makes_logits_stay_as_they_are() -> None:
    for name, last in (
        ("vit", {"head"}),
        ("distilbert", {"pre_classifier", "classifier"}),
        ("xlm-roberta", {"classifier.dense", "classifier.out_proj"}),
        ("llama", {"lm_head"}),
        ("llama-classifier", {"score"}),
    ):
        base = in_four_bits(build_wide(name))
        four, others = names(base.module)
        assert four and others == last == set(base.whole or ()), name


def test_layers_whose_rows_are_no_whole_blocks_stay_as_they_are() -> None:
    """The kernel for CPUs of bitsandbytes 0.50.2 takes wrong scales for them."""
    four, others = names(in_four_bits(build_wide("swin")).module)
    assert "layers.0.blocks.0.attn.qkv" in others and "layers.1.blocks.0.attn.qkv" in four
    assert all(name.startswith("layers.0.") or name == "head.fc" for name in others)


@pytest.mark.parametrize("name", ["gpt2", "falcon"])
def test_a_model_without_plain_linear_layers_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^model.dtype = 'nf4': hf/\w+ has no plain linear layer .*; take bfloat16$"):
        in_four_bits(build(name, small=True) if name == "gpt2" else build_wide(name))


def test_the_rest_is_in_the_precision_of_products_and_the_head_starts_as_published() -> None:
    base = build_wide("bert")
    published = base.module.classifier.weight.detach().clone()
    cast = cast_base(base, CPU, torch.bfloat16, four_bits=True)
    kinds = {parameter.dtype for parameter in cast.module.parameters()}
    assert kinds == {torch.bfloat16} and torch.equal(cast.head_weights["classifier"]["weight"], published)


def test_the_digest_is_that_of_the_published_weights(tmp_path: Path) -> None:
    save_hf(tmp_path, "bert", "classifier", hidden_size=64, num_labels=2)
    settings, about = ModelSettings(name=f"hf/{tmp_path}", dtype="nf4"), Facts("text", ("a", "b"))
    found = [cast_base(load_base_model(settings, about), CPU, torch.float32, four_bits=four) for four in (False, True, True)]
    assert len({base.provenance.digest for base in found}) == 1
    once, again = (base.module.state_dict() for base in found[1:])
    assert all(torch.equal(value, again[name]) for name, value in once.items())


def test_published_weights_that_are_quantised_already_are_refused(tmp_path: Path) -> None:
    save_hf(tmp_path, "bert", "classifier", hidden_size=64, num_labels=2)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="its weights are quantised already; take those that they were made from"):
        load_base_model(ModelSettings(name=f"hf/{tmp_path}"), Facts("text", ("a", "b")))


def test_code_of_the_hub_is_neither_fetched_nor_advised(tmp_path: Path) -> None:
    """Where the processor has bfloat16, bitsandbytes asks the package ``kernels`` for it."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*names, **more):\n    print('fetched')\n    raise RuntimeError\n")
    script = "import lalora_flwr.adapter.lora, bitsandbytes, kernels; print(kernels.__name__)"
    path = [str(tmp_path), *(place for place in sys.path if place)]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": ":".join(path)}
    )
    assert done.stdout == "kernels\n" and "kernels" not in done.stderr
