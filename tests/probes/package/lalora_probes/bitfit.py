"""BitFit (arXiv 2106.10199): the biases train, nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalora_flwr.adapter.form import Adapter, AdapterForm
from lalora_flwr.adapter.slots import Slot
from lalora_flwr.gradients.rules import PerSampleLayer, per_sample_rule
from lalora_flwr.methods.method import Method
from lalora_flwr.methods.schedules import BOTH
from lalora_flwr.methods.travel import TRAINED
from lalora_flwr.models.base import BaseModel
from lalora_flwr.settings import LoraSettings


class Norm(nn.LayerNorm):
    """Of a type of its own: this package has a rule for torch's already."""


@per_sample_rule(Norm)
class PerSampleNorm(PerSampleLayer, Norm):
    """With a bias for each record; the scale stays frozen."""

    def forward(self, x: Tensor) -> Tensor:
        if not self._pass.records or not self.bias.requires_grad:
            return super().forward(x)
        self._pass.check(x)
        y = F.layer_norm(x, self.normalized_shape, self.weight, None, self.eps)
        rows = y.reshape(self._pass.records, -1, y.shape[-1]) + self._pass.view(self.bias).unsqueeze(1)
        return rows.reshape(y.shape)


class BitFit(AdapterForm):
    def attach(self, base: BaseModel, settings: LoraSettings, seed: int) -> Adapter:
        slots = {}
        for layer, module in base.module.named_modules():
            if type(module) in (nn.Linear, nn.LayerNorm) and module.bias is not None and not layer.startswith(base.head):
                module.__class__ = Norm if type(module) is nn.LayerNorm else nn.Linear
                module.bias = nn.Parameter(module.bias.detach().to(torch.float32, copy=True))
                slots[Slot(f"{layer}.bias", layer, "bias", tuple(module.bias.shape), 0)] = module.bias
        return Adapter(base.module, slots)


FORM = BitFit()
METHOD = Method(schedule=BOTH, travel=TRAINED, form="probe-bitfit")
