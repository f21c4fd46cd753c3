"""BitFit (arXiv 2106.10199): the biases of linear layers and of layer norms train, and nothing else but a trained head.

Left out are the bias of a patch embedding, a convolution, and that of an attention's keys where no rotary positions follow:
it adds the same to every score of a query, so that nothing depends on it. Also left out is what makes SwinV2's positions,
which sees no record. Safe under record-level DP as published; DP-BiTFiT (arXiv 2210.00036) is this under DP-SGD.
"""

from __future__ import annotations

from timm.layers.norm import LayerNorm as TimmLayerNorm
from torch import nn
from transformers.pytorch_utils import Conv1D

from lalora_flwr.adapter.form import AdapterForm
from lalora_flwr.adapter.lora import in_head, matches, refuse_batch_norm
from lalora_flwr.adapter.plain import NOT_FACTORS, PlainAdapter, Slots, own_head, replaced
from lalora_flwr.adapter.slots import Slot
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.base import BaseModel
from lalora_flwr.models.four_bits import FourBitLinear
from lalora_flwr.settings import LoraSettings

BIAS = "bias"
WITH_BIAS: tuple[type[nn.Module], ...] = (nn.Linear, FourBitLinear, Conv1D, nn.LayerNorm, TimmLayerNorm)  # exactly of these types
IDLE: dict[str, tuple[str, ...]] = {  # names of keys' layers, by types of models
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "albert", "electra"), ("key",)),
    "mobilebert": ("key", "bottleneck.attention.dense"),  # of which keys and queries are made
    "distilbert": ("k_lin",),
    "opt": ("k_proj",),
    "phi": ("k_proj",),  # half of it has no rotary positions
}
POSITIONS = "cpb_mlp"  # SwinV2's


class BitFit(AdapterForm):
    """Biases, from their published values; nothing is drawn but a new head."""

    parts = frozenset({BIAS})
    unused = NOT_FACTORS | {"targets", "size"}

    def attach(self, base: BaseModel, settings: LoraSettings, seed: int) -> PlainAdapter:
        """As `AdapterForm.attach`.

        Raises:
            ConfigError: the model has no biases, there is no head to train, or the model has BatchNorm.
        """
        refuse_batch_norm(base)
        idle = IDLE.get(str(getattr(getattr(base.module, "config", None), "model_type", "")), ())
        slots: Slots = {}
        for layer, module in base.module.named_modules():
            bias = getattr(module, "bias", None)
            if type(module) not in WITH_BIAS or bias is None or in_head(layer, base.head, trained=True):
                continue
            if POSITIONS in layer.split(".") or any(matches(layer, name) for name in idle):
                continue
            parameter = replaced(module, "bias", bias)
            slots[Slot(f"{layer}.bias", layer, BIAS, tuple(parameter.shape), 0)] = parameter
        if not slots:
            raise ConfigError(
                f"lora.form = 'bitfit': {base.name} has no biases of linear layers or layer norms; choose another form"
            )
        return PlainAdapter(base, base.module, slots, own_head(base, settings, seed))


BITFIT = BitFit()
