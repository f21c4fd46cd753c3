"""A whole LoRA layer, frozen base and adapter, as one autograd function with per-sample gradients.

PEFT runs the adapter beside the base layer and adds the two outputs; autograd then adds two input gradients. Here the
adapter's products accumulate into the base layer's output and input gradient, no tensor of full width is made twice, and
with a low-precision base nothing of full width is cast to float32. What a frozen factor alone would need is neither
computed nor kept: the input is saved only if A trains, the rank-r activation only if B trains.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from torch import Tensor, nn

from lalora_flwr.gradients.products import KERNELS
from lalora_flwr.gradients.records import RecordPass, Whose
from lalora_flwr.models.four_bits import FourBitLinear


class LoraFunction(torch.autograd.Function):
    """y = x W0ᵀ + bias + s (x Aᵀ) Bᵀ, with a gradient for every record's own A and B.

    Shapes: x (…, in) with the records outermost, y (rows, out) with all axes of x but the last as rows, W0 (out, in),
    A (sites, r, in), B (sites, out, r): ``whose`` lets each site's rows meet its own factors. ``views_A`` and ``views_B`` are
    the per-record leaves (records, *shape) that take the gradients, or None for a frozen factor. Products run in the precision
    of x; per-sample gradients come back in that of the factors.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: nn.Linear, A: Tensor, B: Tensor, views_A: Tensor | None, views_B: Tensor | None,
        scaling: float, records: int, whose: Whose,
    ) -> Tensor:  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])  # (rows, in)
        A, B = A.to(x.dtype), B.to(x.dtype)
        y = KERNELS.product(rows, base.weight, base.bias)
        u = whose.times(rows, A.transpose(1, 2))  # (rows, r)
        whose.add(y, u, B.transpose(1, 2), scaling)
        ctx.save_for_backward(None if views_A is None else rows, None if views_B is None else u, A, B)
        ctx.base = base  # not its weight: one in four bits is made anew
        ctx.scaling, ctx.records, ctx.shape, ctx.whose = scaling, records, x.shape, whose
        ctx.dtype_A = None if views_A is None else views_A.dtype
        ctx.dtype_B = None if views_B is None else views_B.dtype
        return y  # a view made in here could not be changed in place, as timm's BEiT does

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, u, A, B = ctx.saved_tensors
        dy = outputs[0].reshape(-1, ctx.base.out_features)  # (rows, out)
        dx = grad_A = grad_B = None
        if u is not None:
            grad_B = (_of_each_record(dy, u, ctx.records) * ctx.scaling).to(ctx.dtype_B)  # (records, out, r)
        if rows is not None or ctx.needs_input_grad[0]:
            du = ctx.whose.times(dy, B * ctx.scaling)  # (rows, r)
        if rows is not None:
            grad_A = _of_each_record(du, rows, ctx.records).to(ctx.dtype_A)  # (records, r, in)
        if ctx.needs_input_grad[0]:
            dx = ctx.whose.add(KERNELS.product(dy, ctx.base.weight.t()), du, A, 1.0).view(ctx.shape)
        return dx, None, None, None, grad_A, grad_B, None, None, None


def _of_each_record(left: Tensor, right: Tensor, records: int) -> Tensor:
    """leftᵀ right within each record: (rows, a), (rows, b) -> (records, a, b)."""
    return torch.bmm(left.view(records, -1, left.shape[1]).transpose(1, 2), right.view(records, -1, right.shape[1]))


class FusedLoraLinear(PeftLoraLinear):
    """PEFT's LoRA layer that, inside `PerSampleGradients`, runs as one `LoraFunction`; outside of it, unchanged."""

    _pass: RecordPass

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.active_adapters[0]
        dropout = self.lora_dropout[name]
        plain = isinstance(dropout, nn.Identity) or not dropout.training
        if not self._pass.records or self.disable_adapters or self.merged or not plain:
            return super().forward(x, *args, **kwargs)  # its lora_A and lora_B are per-sample layers themselves
        self._pass.check(x)
        A, B = self._factor(self.lora_A, name), self._factor(self.lora_B, name)
        y: Tensor = LoraFunction.apply(
            x,
            self.base_layer,
            self._pass.values(A),
            self._pass.values(B),
            self._pass.leaf(A) if A.requires_grad else None,
            self._pass.leaf(B) if B.requires_grad else None,
            self.scaling[name],
            self._pass.records,
            self._pass.whose(math.prod(x.shape[:-1])),
        )
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def _factor(layers: nn.ModuleDict, name: str) -> Tensor:
        layer = layers[name]
        assert isinstance(layer, nn.Linear)
        return layer.weight


def can_fuse(layer: nn.Module) -> bool:
    """Whether a layer is a plain PEFT LoRA layer on a linear layer: one adapter, no variant such as DoRA."""
    return (
        type(layer) is PeftLoraLinear
        and type(layer.base_layer) in (nn.Linear, FourBitLinear)
        and len(layer.lora_A) == 1
        and not layer.lora_variant
        and not layer.fan_in_fan_out
        and all(isinstance(linear, nn.Linear) and linear.bias is None for linear in layer.lora_B.values())
    )
