"""The tests' own view of a LoRA adapter, by PEFT's functions and names alone; nothing here knows slots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from lalora_flwr.adapter.lora import LORA, LoraAdapter
from lalora_flwr.adapter.slots import LORA_A, LORA_B, Layout, Mask
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.gradients.self_check import self_check
from lalora_flwr.models.base import BaseModel
from lalora_flwr.settings import LoraSettings

WHOLE = frozenset({"A", "B", "head"})
BOTH = frozenset("AB")


def attach_adapter(base: BaseModel, lora: LoraSettings, seed: int) -> PeftModel:
    return LORA.attach(base, lora, seed).model


def factor_of(name: str) -> str:
    """``A``, ``B`` or ``head``."""
    return "A" if ".lora_A." in name else "B" if ".lora_B." in name else "head"


def select(names: Iterable[str], factors: Iterable[str]) -> list[str]:
    """The names of some factors and of a trained head."""
    return [name for name in names if factor_of(name) in {*factors, "head"}]


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By their names in the model."""
    parts = (".lora_A.", ".lora_B.", ".modules_to_save.")
    return {name: p for name, p in model.named_parameters() if any(part in name for part in parts)}


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """Under the names of an adapter folder."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: state[name].detach().cpu().clone() for name in sorted(state)}


def load_adapter_state(model: PeftModel, state: Mapping[str, Tensor]) -> None:
    set_peft_model_state_dict(model, dict(state))


def set_active(model: nn.Module, factors: Iterable[str]) -> dict[str, nn.Parameter]:
    """Some factors and a trained head require gradients, nothing else; by their names in the model."""
    parameters = adapter_parameters(model)
    for name, p in parameters.items():
        p.requires_grad_(name in select(parameters, factors))
        p.grad = None
    return {name: p for name, p in parameters.items() if p.requires_grad}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """All that require a gradient now, by their names in the model."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def engine_for(model: nn.Module) -> PerSampleGradients:
    """An engine for all that requires a gradient now, by names in the model."""
    return PerSampleGradients(model, trainable(model))


def lora_of(model: PeftModel) -> LoraAdapter:
    """A model's adapter, as the package describes it."""
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    base = BaseModel("test", model.get_base_model(), "", (), (), 0)
    return LoraAdapter(model, base, LoraSettings(rank=config.r, alpha=float(config.lora_alpha)))


def check(base: BaseModel, model: PeftModel, engine: type[PerSampleGradients] = PerSampleGradients) -> None:
    """The check before training."""
    adapter = lora_of(model)
    self_check(base, adapter, engine(model, adapter.parameters))


def mask(layout: Layout, factors: Iterable[str]) -> Mask:
    """The slots of some factors and of a trained head."""
    parts = {"A": LORA_A, "B": LORA_B}
    return layout.names - layout.of(*(part for letter, part in parts.items() if letter not in set(factors)))
