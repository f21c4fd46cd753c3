"""A base model with its adapter and gradient engine; the base is loaded once in a process."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from functools import lru_cache

import torch
from peft import PeftModel
from torch import Tensor, nn

from lalora_flwr.adapter.lora import adapter_state, attach_adapter, head_modules
from lalora_flwr.data.data_set import Facts, facts
from lalora_flwr.gradients.dropout import remove_dropout
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.gradients.self_check import self_check
from lalora_flwr.ground.hardware import choose_device, choose_dtype
from lalora_flwr.ground.seeds import derive_seed
from lalora_flwr.models import load_base_model
from lalora_flwr.models.base import BaseModel
from lalora_flwr.settings import LoraSettings, ModelSettings, Settings


@dataclass(frozen=True)
class Adapted:
    """``initial``: the adapter as drawn from the run's seed, the same in every process."""

    base: BaseModel
    model: PeftModel
    engine: PerSampleGradients
    initial: dict[str, Tensor]


def adapted_model(settings: Settings, device: str = "") -> Adapted:
    """The run's model, checked and ready to train. Shared by all callers in the process: load an adapter before use.

    Args:
        settings: the run's settings.
        device: where to compute, as ``train.device``, which it overrides; a site's own word.

    Raises:
        ConfigError: the model cannot be used (no target matched, BatchNorm, records that are not independent, …).
    """
    place = choose_device(device or settings.train.device)
    about, data = facts(settings), settings.data
    checkpointing = settings.train.gradient_checkpointing
    return _adapted(settings.model, about, data.max_tokens, data.answer, settings.lora, settings.seed, checkpointing, place)


@lru_cache(maxsize=1)
def _base(model: ModelSettings, about: Facts, max_tokens: int, answer: str, device: torch.device) -> BaseModel:
    base = load_base_model(model, about, max_tokens, answer)
    base.module.requires_grad_(False)
    return cast_base(base, device, choose_dtype(model.dtype, device))


@lru_cache(maxsize=1)
def _adapted(
    model_settings: ModelSettings,
    about: Facts,
    max_tokens: int,
    answer: str,
    lora: LoraSettings,
    seed: int,
    checkpointing: bool,
    device: torch.device,
) -> Adapted:
    base = sharing_weights(_base(model_settings, about, max_tokens, answer, device))
    remove_dropout(base.module)  # of the frozen weights: it would only add noise to the noise, and memory; lora.dropout stays
    if checkpointing:
        base.checkpoint_activations()
    model = attach_adapter(base, lora, derive_seed(seed, "adapter")).to(device)
    engine = PerSampleGradients(model)
    self_check(base, model, engine)
    return Adapted(base, model, engine, adapter_state(model))


def cast_base(base: BaseModel, device: torch.device, dtype: torch.dtype) -> BaseModel:
    """The base on a device and in a precision; a trained head starts from the published values all the same."""
    kept = {name: _in_full(module) for name, module in head_modules(base).items()}
    base.module.to(device, dtype)  # before the adapter, whose factors stay float32
    return dataclasses.replace(base, head_weights=kept)


def _in_full(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict().items()
    return {name: t.detach().to(torch.promote_types(t.dtype, torch.float32), copy=True) for name, t in state}


def sharing_weights(base: BaseModel) -> BaseModel:
    """A copy whose modules are its own and whose weights are the original's: an adapter can be put on it and thrown away."""
    tensors: list[Tensor | nn.Parameter] = [*base.module.parameters(), *base.module.buffers()]
    return dataclasses.replace(base, module=copy.deepcopy(base.module, {id(tensor): tensor for tensor in tensors}))
