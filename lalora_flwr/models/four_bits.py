"""Frozen linear layers in four bits, NF4 (arXiv 2305.14314): half a byte for a weight and four for the scale of each 64.

A layer makes its weight anew from the bits for each product, in the precision of the rest of the model, and keeps none of it.
The bits are made on the CPU from the weights as they are published, number by number, and so are the same on every machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.extras import need_four_bits
from lalora_flwr.models.base import BaseModel

NF4 = "nf4"  # value of ``model.dtype``, and bitsandbytes' own name
BLOCK = 64  # weights that share a scale; a row holds whole blocks, which bitsandbytes' kernel for CPUs takes for granted
Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class FourBitLinear(nn.Linear):
    """A linear layer whose frozen weight is kept in four bits. (…, in) to (…, out).

    Attributes:
        packed: uint8, two weights in each.
        scales: the bits of float32 numbers as int32, which no cast of the model rounds.
        like: empty; its type is that of products, and follows that of the model.
    """

    packed: Tensor
    scales: Tensor
    like: Tensor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a parameter elsewhere
        """(out, in), made anew whenever it is asked for: what is written into it is lost."""
        made = self.like.dtype if self.like.dtype != torch.float64 else torch.float32
        scales = self.scales.view(torch.float32)
        shape = (self.out_features, self.in_features)
        weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(self.packed, scales, BLOCK, NF4, shape, made)
        return weight.to(self.like.dtype)

    def forward(self, input: Tensor) -> Tensor:
        if self.bias is None or not self.bias.requires_grad:
            return frozen_product(input, self, self.bias)
        y = frozen_product(input, self)
        return y + self.bias.to(y.dtype)


def frozen_product(x: Tensor, layer: FourBitLinear, bias: Tensor | None = None, multiply: Multiply = F.linear) -> Tensor:
    """x Wᵀ + bias with the layer's weight: (…, in), (out,) -> (…, out). Neither it nor its gradient keeps a whole weight.

    Args:
        x: in the precision of the model.
        layer: of which the weight is.
        bias: frozen.
        multiply: x, weight, bias -> x weightᵀ + bias.
    """
    y: Tensor = _Product.apply(x, layer, bias, False, multiply)
    return y


class _Product(torch.autograd.Function):
    """A product with a layer's weight or its transpose; its gradient is one too, so that it can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FourBitLinear, bias: Tensor | None, transposed: bool, multiply: Multiply) -> Tensor:
        ctx.layer, ctx.transposed, ctx.multiply = layer, transposed, multiply
        weight = layer.weight
        return multiply(x, weight.t() if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        dx = _Product.apply(outputs[0], ctx.layer, None, not ctx.transposed, ctx.multiply) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None


def in_four_bits(base: BaseModel) -> BaseModel:
    """The base with its frozen linear layers in four bits, in place; the head, embeddings, norms and biases stay as they are.

    So do a language model's last layer, layers with rows that are no whole number of blocks, and layers of other types: experts,
    transformers' ``Conv1D``.

    Raises:
        ConfigError: bitsandbytes is not installed, or no layer can be kept that way.
    """
    need_four_bits()
    import bitsandbytes  # noqa: F401  # registers its operators

    linear = {name: module for name, module in base.module.named_modules() if type(module) is nn.Linear}
    whole = tuple(name for name, module in linear.items() if _is_last(base, name, module))
    chosen = [module for name, module in linear.items() if name not in whole and module.in_features % BLOCK == 0]
    if not chosen:
        raise ConfigError(
            f"model.dtype = {NF4!r}: {base.name} has no plain linear layer with a multiple of {BLOCK} inputs before its head; "
            "take bfloat16"
        )
    for module in chosen:
        _pack(module)
    return dataclasses.replace(base, whole=whole)


def _is_last(base: BaseModel, name: str, module: nn.Module) -> bool:
    """Whether a layer belongs to the head, whether that is trained or not, or makes a language model's logits."""
    outputs = getattr(base.module, "get_output_embeddings", lambda: None)()
    return module is outputs or bool(base.head and (name.endswith(base.head) or name.startswith(f"{base.head}.")))


@torch.no_grad()
def _pack(layer: nn.Linear) -> None:
    """Make a layer, in place, a `FourBitLinear` where it is."""
    weight, device = layer.weight, layer.weight.device
    source = weight if weight.is_meta else weight.cpu()
    packed, scales = torch.ops.bitsandbytes.quantize_4bit(source.float(), BLOCK, NF4, torch.uint8)
    del layer.weight
    layer.__class__ = FourBitLinear
    layer.register_buffer("packed", packed.to(device))
    layer.register_buffer("scales", scales.view(torch.int32).to(device))
    layer.register_buffer("like", torch.empty(0, dtype=weight.dtype, device=device), persistent=False)


@torch.no_grad()
def unpacked(model: nn.Module) -> None:
    """Make all layers in four bits, in place, plain ones with their weights, for derivatives with respect to these."""
    for layer in model.modules():
        if isinstance(layer, FourBitLinear):
            weight = layer.weight
            layer.__class__ = nn.Linear  # type: ignore[assignment]
            for name in ("packed", "scales", "like"):
                delattr(layer, name)
            layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))


def packing(base: BaseModel) -> list[str]:
    """Lines of Python that do the same to ``base``, the published model, by bitsandbytes alone; none if it has no four bits."""
    if base.whole is None:
        return []
    condition = f"type(layer) is torch.nn.Linear and layer.in_features % {BLOCK} == 0"
    condition += f" and not name.endswith({base.whole!r})" if base.whole else ""
    return [
        "import torch",
        "from bitsandbytes.nn import Linear4bit  # without these lines down to PEFT's: on the published weights, for a merge",
        "for name, layer in list(base.named_modules()):",
        f"    if {condition}:",
        f"        four = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, None, False, {NF4!r})",
        "        four.load_state_dict(layer.state_dict())",
        '        base.set_submodule(name, four.to("cpu"))',
        "base.is_loaded_in_4bit = True  # for PEFT",
    ]
