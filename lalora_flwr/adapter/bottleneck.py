"""Bottleneck adapters: y + W_up gelu(W_down y + b_down) + b_up behind a linear layer whose output is y.

By default behind both the attention and the MLP of every block, before the residual (Houlsby et al., arXiv 1902.00751).
Behind the MLP alone, as Pfeiffer et al. (arXiv 2005.00052) found to do as well, with ``lora.targets`` naming its last layer.
W_up and b_up start at zero, so the model starts as it was published. Safe under record-level DP as published: a record's
gradient is clipped and noised as any other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lalora_flwr.adapter.form import AdapterForm
from lalora_flwr.adapter.lora import adaptable, in_head, matches, refuse_batch_norm, short
from lalora_flwr.adapter.plain import PlainAdapter, Slots, own_head
from lalora_flwr.adapter.slots import Slot
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.base import BaseModel
from lalora_flwr.settings import LoraSettings

DOWN, UP = "down", "up"
UNITS = 16
RESIDUAL = (  # what writes to the residual stream, by the names of the admitted architectures
    *("attn.proj", "mlp.fc2", "attention.output.dense", "output.dense", "out_lin", "lin2", "c_proj", "o_proj", "down_proj"),
    *("attention.dense", "self_attn.dense", "self_attention.dense", "dense_4h_to_h", "out_proj", "fc2", "Wo", "ffn_output"),
)

BUILDING = """class Bottleneck(torch.nn.Module):
    def __init__(self, layer, units):
        super().__init__()
        width = getattr(layer, "out_features", None) or layer.nf
        self.layer, self.down, self.up = layer, torch.nn.Linear(width, units), torch.nn.Linear(units, width)
    @property
    def weight(self):
        return self.layer.weight
    def forward(self, x):
        y = self.layer(x)
        return y + self.up(torch.nn.functional.gelu(self.down(y)))
for name in dict.fromkeys(key.rpartition(".")[0].rpartition(".")[0] for key in load_file(Path(adapter) / "adapter.safetensors")):
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, Bottleneck(model.get_submodule(name), {units}))"""


class Bottleneck(nn.Module):
    """A frozen layer and the small one behind it."""

    def __init__(self, layer: nn.Linear | Conv1D, units: int) -> None:
        super().__init__()
        width, place = layer.nf if isinstance(layer, Conv1D) else layer.out_features, layer.weight.device
        kind = torch.promote_types(layer.weight.dtype, torch.float32)
        self.layer = layer
        self.down = nn.Linear(width, units, device=place, dtype=kind)
        self.up = nn.Linear(units, width, device=place, dtype=kind)

    @property
    def weight(self) -> Tensor:
        """Of the frozen layer, for models that look at its type."""
        return self.layer.weight

    @torch.no_grad()
    def start(self) -> None:
        """First values, from the global generator."""
        drawn = nn.Linear(self.down.in_features, self.down.out_features)
        self.down.load_state_dict(drawn.state_dict())
        for parameter in self.up.parameters():
            parameter.zero_()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        inner = F.gelu(self.down(y.to(self.down.weight.dtype)))
        added: Tensor = self.up(inner)
        return y + added.to(y.dtype)


class BottleneckForm(AdapterForm):
    """Houlsby's adapters, or those behind the layers that ``lora.targets`` names; ``lora.size`` units each."""

    gate = UP
    stride = 0.5  # two matrices in a row move
    parts = frozenset({DOWN, UP})
    unused = frozenset({"rank", "alpha", "dropout"})

    def attach(self, base: BaseModel, settings: LoraSettings, seed: int) -> PlainAdapter:
        """As `AdapterForm.attach`.

        Raises:
            ConfigError: no target matches, there is no head to train, or the model has BatchNorm.
        """
        refuse_batch_norm(base)
        chosen = _layers(base, settings)
        units, slots = settings.size or UNITS, Slots()
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            for layer in chosen:
                parent, _, name = layer.rpartition(".")
                own = Bottleneck(base.module.get_submodule(layer), units)  # type: ignore[arg-type]  # of `adaptable`
                if not own.down.weight.is_meta:
                    own.start()
                setattr(base.module.get_submodule(parent), name, own)
                for part, linear in ((DOWN, own.down), (UP, own.up)):
                    for what, parameter in linear.named_parameters():
                        axis = 0 if part == UP else (1 if what == "weight" else None)
                        slots[Slot(f"{layer}.{part}.{what}", layer, part, tuple(parameter.shape), axis)] = parameter
        head = own_head(base, settings, seed)
        return PlainAdapter(base, base.module, slots, head, tuple(BUILDING.replace("{units}", str(units)).splitlines()))


def _layers(base: BaseModel, lora: LoraSettings) -> list[str]:
    """The names of the layers that get one.

    Raises:
        ConfigError: a target matches none.
    """
    there = [name for name in adaptable(base.module) if not in_head(name, base.head, trained=True)]
    targets = RESIDUAL if lora.targets == "auto" else tuple(t.strip() for t in lora.targets.split(",") if t.strip())
    found = [name for name in there if any(matches(name, target) for target in targets)]
    missing = [target for target in targets if not any(matches(name, target) for name in there)]
    if not found or (missing and lora.targets != "auto"):
        raise ConfigError(
            f"lora.targets = {lora.targets!r}: {missing[0]!r} matches no linear layer "
            f"of {base.name}; it has {short(dict.fromkeys(name.rpartition('.')[2] for name in there), 20)}"
        )
    return found


BOTTLENECK = BottleneckForm()
