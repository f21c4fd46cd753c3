"""A base model with its adapter and gradient engine, loaded once in a process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from peft import PeftModel
from torch import Tensor

from lalora_flwr.config import LoraSettings, ModelSettings, Settings
from lalora_flwr.data.records import dataset
from lalora_flwr.hardware import choose_device, choose_dtype
from lalora_flwr.lora.adapter import adapter_state, attach_adapter
from lalora_flwr.lora.dropout import remove_dropout
from lalora_flwr.lora.per_sample import PerSampleGradients
from lalora_flwr.lora.self_check import self_check
from lalora_flwr.models import load_base_model
from lalora_flwr.models.base import BaseModel
from lalora_flwr.privacy.randomness import derive_seed


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
    train = settings.train
    place = choose_device(device or train.device)
    return _load(settings.model, settings.lora, settings.data.name, settings.seed, train.gradient_checkpointing, place)


@lru_cache(maxsize=1)
def _load(
    model_settings: ModelSettings, lora: LoraSettings, data: str, seed: int, checkpointing: bool, device: torch.device
) -> Adapted:
    base = load_base_model(model_settings, dataset(data))
    remove_dropout(base.module)  # of the frozen weights: it would only add noise to the noise, and memory; lora.dropout stays
    base.module.to(device, choose_dtype(model_settings.dtype, device))  # before the adapter, whose factors stay float32
    if checkpointing:
        base.checkpoint_activations()
    model = attach_adapter(base, lora, derive_seed(seed, "adapter")).to(device)
    engine = PerSampleGradients(model)
    self_check(base, model, engine)
    return Adapted(base, model, engine, adapter_state(model))
