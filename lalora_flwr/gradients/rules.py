"""How a layer gives per-sample gradients: rules by type of layer, registered as Opacus registers grad samplers.

A rule is a subclass of the layer whose ``forward`` uses, inside of a pass, `RecordPass.view` of each parameter for which
`RecordPass.each` is true instead of the parameter itself. A form that trains other layers than linear ones registers its own:

    @per_sample_rule(nn.LayerNorm)
    class PerSampleLayerNorm(PerSampleLayer, nn.LayerNorm):
        def forward(self, x): ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from lalora_flwr.adapter.ridge import RidgeLayer
from lalora_flwr.gradients.fused import FusedLoraLinear, can_fuse
from lalora_flwr.gradients.products import KERNELS
from lalora_flwr.gradients.records import RecordPass
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.four_bits import FourBitLinear, frozen_product

L = TypeVar("L", bound=type[nn.Module])


class PerSampleLayer:
    """What rules have in common: the pass that is under way, or not."""

    _pass: RecordPass


_rules: dict[type[nn.Module], type[nn.Module]] = {}


def per_sample_rule(layer: type[nn.Module]) -> Callable[[L], L]:
    """Make the decorated class the rule of a type of layer; exactly of this type, not of types derived from it.

    Raises:
        ValueError: the type has another rule already, or the class is not derived from it and `PerSampleLayer`.
    """

    def register(rule: L) -> L:
        if not (issubclass(rule, layer) and issubclass(rule, PerSampleLayer)):
            raise ValueError(f"{rule.__name__} must be derived from PerSampleLayer and {layer.__name__}")
        if _rules.setdefault(layer, rule) is not rule:
            raise ValueError(f"{layer.__name__} has a rule already: {_rules[layer].__name__}")
        return rule

    return register


@per_sample_rule(nn.Linear)
class PerSampleLinear(PerSampleLayer, nn.Linear):
    """A linear layer that, inside of a pass, uses one view of its trained parameters for each record."""

    def forward(self, x: Tensor) -> Tensor:
        x, records = x.to(self.weight.dtype), self._pass.records  # float32 factors on a low-precision base
        if not records or not (self._pass.each(self.weight) or (self.bias is not None and self._pass.each(self.bias))):
            return KERNELS.linear(
                x, self.weight, None if self.bias is None else self.bias.to(x.dtype)
            )  # a trained bias is float32
        self._pass.check(x)
        rows = x.reshape(records, -1, x.shape[-1])  # (records, tokens, in)
        if self._pass.each(self.weight):
            y = torch.bmm(rows, self._pass.view(self.weight).transpose(1, 2))  # (records, tokens, out)
        else:
            y = KERNELS.linear(rows, self.weight)
        if self.bias is not None:
            y = y + (self._pass.view(self.bias).unsqueeze(1) if self._pass.each(self.bias) else self.bias).to(y.dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1])


@per_sample_rule(FourBitLinear)
class PerSampleFourBitLinear(PerSampleLayer, FourBitLinear):
    """A layer in four bits whose bias trains."""

    def forward(self, input: Tensor) -> Tensor:
        x = input.to(self.like.dtype)
        if not self._pass.records or not self._pass.each(self.bias):
            return frozen_product(x, self, multiply=KERNELS.product) + self.bias.to(x.dtype)
        self._pass.check(x)
        rows = x.reshape(self._pass.records, -1, x.shape[-1])
        y = frozen_product(rows, self, multiply=KERNELS.product) + self._pass.view(self.bias).unsqueeze(1).to(x.dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1])


@per_sample_rule(RidgeLayer)
class PerSampleRidge(PerSampleLayer, RidgeLayer):
    """With sums of each record's own."""

    def trained(self) -> tuple[Tensor, Tensor]:
        if not self._pass.records:
            return super().trained()
        self._pass.check(self.seen)
        return self._pass.view(self.gram), self._pass.view(self.cross)


def follow_rules(model: nn.Module, trained: set[int], records: RecordPass) -> None:
    """Give every layer that owns a trained parameter its rule, and let plain LoRA layers run fused with their base layer.

    Args:
        model: changed in place.
        trained: ``id`` of all parameters that may ever train.
        records: the state of the passes to come.

    Raises:
        ConfigError: a layer has none, or a parameter that is not to be trained is not frozen.
    """
    ruled = set(_rules.values())
    for name, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in trained:
                raise ConfigError(f"{name}.{own_name}: not frozen, and none of what is trained")
        own = [n for n, p in module.named_parameters(recurse=False) if id(p) in trained]
        if own and type(module) not in ruled:
            if type(module) not in _rules:
                layer = type(module).__name__
                raise ConfigError(f"{name}.{own[0]}: no per-sample gradient for a {layer}; adapt linear layers")
            module.__class__ = _rules[type(module)]
        elif can_fuse(module):
            module.__class__ = FusedLoraLinear
        if isinstance(module, PerSampleLayer | FusedLoraLinear):
            module._pass = records
