"""Rules of the layers that forms other than LoRA train."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers.norm import LayerNorm as TimmLayerNorm
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lalora_flwr.adapter.pixel_prompt import Frame
from lalora_flwr.adapter.soft_prompt import PromptedEmbedding
from lalora_flwr.adapter.visual_prompt import WithTokens
from lalora_flwr.gradients.rules import PerSampleLayer, per_sample_rule


class _BiasOfNorm(PerSampleLayer):
    """A layer norm whose bias trains, and whose scale does not."""

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self, nn.LayerNorm)
        if not (self._pass.records and self._pass.each(self.bias)):
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias.to(x.dtype), self.eps)
        return _with_bias(self, F.layer_norm(x, self.normalized_shape, self.weight, None, self.eps), self.bias)


def _with_bias(layer: PerSampleLayer, y: Tensor, bias: Tensor) -> Tensor:
    """What a layer says without its bias, (…, out), and each record's own bias."""
    layer._pass.check(y)
    rows = y.reshape(layer._pass.records, -1, y.shape[-1]) + layer._pass.view(bias).unsqueeze(1).to(y.dtype)
    return rows.reshape(y.shape)


@per_sample_rule(nn.LayerNorm)
class PerSampleLayerNorm(_BiasOfNorm, nn.LayerNorm):
    """torch's."""


@per_sample_rule(TimmLayerNorm)
class PerSampleTimmLayerNorm(_BiasOfNorm, TimmLayerNorm):
    """timm's."""


@per_sample_rule(Conv1D)
class PerSampleConv1D(PerSampleLayer, Conv1D):
    """transformers' linear layer with a transposed weight, whose bias trains."""

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        if self._pass.records and self._pass.each(self.bias):
            return _with_bias(self, y, self.bias)
        return y + self.bias.to(y.dtype)


@per_sample_rule(WithTokens)
class PerSampleTokens(PerSampleLayer, WithTokens):
    """With tokens of each record's own."""

    def trained(self, count: int) -> Tensor:
        if self._pass.records and self._pass.each(self.prompt):
            _one_each(self._pass.records, count)
            return self._pass.view(self.prompt)
        return super().trained(count)


@per_sample_rule(Frame)
class PerSampleFrame(PerSampleLayer, Frame):
    """With a frame of each record's own."""

    def trained(self, count: int) -> Tensor:
        if self._pass.records and self._pass.each(self.prompt):
            _one_each(self._pass.records, count)
            return self._pass.view(self.prompt)
        return super().trained(count)


@per_sample_rule(PromptedEmbedding)
class PerSamplePrompt(PerSampleLayer, PromptedEmbedding):
    """With a prompt of each record's own."""

    def trained(self, count: int) -> Tensor:
        if self._pass.records and self._pass.each(self.prompt):
            _one_each(self._pass.records, count)
            return self._pass.view(self.prompt)
        return super().trained(count)


def _one_each(records: int, count: int) -> None:
    if count != records:
        raise RuntimeError(f"a prompt got {count} rows for {records} records: its record axis cannot be determined")
