"""LoRA factors in and out of a model, through PEFT.

Tensor names on the wire and in an adapter folder are PEFT's own (``…blocks.0.attn.qkv.lora_A.weight``), so what a run
sends, checkpoints and saves is one naming.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterable, Mapping

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.pytorch_utils import Conv1D

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.schedules import BOTH, Factors
from lalora_flwr.models.base import BaseModel
from lalora_flwr.settings import LoraSettings

HEAD = "head"


def _short(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _adaptable(model: nn.Module) -> list[str]:
    """Names of the linear layers, transformers' Conv1D among them, which is one with its weight transposed."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)  # PEFT's rule for a list of target modules


def _in_head(name: str, head: str, trained: bool) -> bool:
    """Whether a layer belongs to the head. A trained one takes along what ends with its name: DistilBERT's pre_classifier."""
    if not head:
        return False
    return name == head or name.startswith(head + ".") or (trained and name.endswith(head))


def _excluded(head: str, trained: bool) -> str | None:
    """`_in_head` as the expression that PEFT takes: a head is trained whole or not at all."""
    if not head:
        return None
    return rf"{'.*' if trained else ''}{re.escape(head)}(\..*)?"


def resolve_targets(base: BaseModel, lora: LoraSettings) -> list[str]:
    """The module names to adapt, each checked against the model.

    Raises:
        ConfigError: if a target matches no linear layer, listing those the model has.
    """
    targets = list(base.targets) if lora.targets == "auto" else [t.strip() for t in lora.targets.split(",") if t.strip()]
    whole = lora.head == "trained"
    linear = [name for name in _adaptable(base.module) if not _in_head(name, base.head, whole)]
    for target in targets or [""]:
        if not any(_matches(name, target) for name in linear):
            raise ConfigError(
                f"lora.targets = {lora.targets!r}: {target!r} matches no linear layer of {base.name}; it has "
                f"{_short(dict.fromkeys(name.rpartition('.')[2] for name in linear), 20)}"
            )
    return targets


def _refuse_batch_norm(base: BaseModel) -> None:
    # BatchNorm under any name: EvoNorm's batch variants keep a running variance too
    mixing = [name for name, m in base.module.named_modules() if isinstance(m, _BatchNorm) or hasattr(m, "running_var")]
    if mixing:
        raise ConfigError(
            f"model.name = {base.name!r}: BatchNorm ({_short(mixing, 3)}) mixes the records of a batch, so no record's "
            "gradient is its own; choose a model without BatchNorm"
        )


def attach_adapter(base: BaseModel, lora: LoraSettings, seed: int) -> PeftModel:
    """Put an adapter on a frozen base model: A Kaiming-uniform from the seed, B zero, everything else frozen.

    With ``lora.head = "trained"`` the classification head is trained too and belongs to the adapter; the seed also draws
    it if the published weights have none. The adapter is float32 or better, and the same for every precision and device of
    the base.

    Raises:
        ConfigError: no target matched, a target holds part of the head, there is no head to train, or the model has
            BatchNorm.
    """
    _refuse_batch_norm(base)
    if lora.head == "trained" and not base.head:
        raise ConfigError(f"lora.head = 'trained': {base.name} has no classification head here; leave it frozen")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides by the rank; a float is fine
        target_modules=resolve_targets(base, lora),
        exclude_modules=_excluded(base.head, lora.head == "trained"),
        lora_dropout=lora.dropout,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.module.modules()),  # PEFT would find out, and warn
        modules_to_save=[base.head] if lora.head == "trained" else None,
    )
    with torch.random.fork_rng(devices=[]):  # PEFT draws values of its own, which are replaced below
        model = get_peft_model(base.module, config)
    for parameter in adapter_parameters(model).values():  # PEFT leaves a trained head in the base's precision
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    if not any(parameter.is_meta for parameter in model.parameters()):
        _start(model, base, seed)
    return model


@torch.no_grad()
def _start(model: nn.Module, base: BaseModel, seed: int) -> None:
    """Give the adapter its first values, drawn in float32 on the CPU: no site's precision or device may show in them."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and ".lora_A." in name:
                module.weight.copy_(nn.Linear(module.in_features, module.out_features, bias=False).weight)
            elif name.endswith(".modules_to_save.default"):
                own = name.removeprefix("base_model.model.").removesuffix(".modules_to_save.default")
                module.load_state_dict(base.head_weights.get(own, module.state_dict()))
                if base.fresh_head:
                    module.load_state_dict(_redrawn(module).state_dict())


def _redrawn(module: nn.Module) -> nn.Module:
    """A copy of a head in float32 on the CPU, with values drawn from the global generator."""
    drawn = copy.deepcopy(module).to("cpu", torch.float32)
    for part in drawn.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()  # type: ignore[operator]
    return drawn


def head_modules(base: BaseModel) -> dict[str, nn.Module]:
    """The modules that a trained head consists of, by name: PEFT takes all whose name ends with the head's."""
    return {name: module for name, module in base.module.named_modules() if base.head and name.endswith(base.head)}


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors under PEFT's names, in a fixed order, as copies on the CPU."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: state[name].detach().cpu().clone() for name in sorted(state)}


def load_adapter_state(model: PeftModel, state: Mapping[str, torch.Tensor]) -> None:
    """Put tensors (all of the adapter's, or some of them) into the model.

    Raises:
        KeyError: if a name is not one of the adapter's: PEFT alone would ignore it without a word.
    """
    unknown = set(state) - set(adapter_state(model))
    if unknown:
        raise KeyError(f"not part of this adapter: {_short(sorted(unknown))}")
    set_peft_model_state_dict(model, dict(state))


def factor_of(name: str) -> str:
    """``A``, ``B`` or ``head``: which part of the adapter a tensor or parameter belongs to, by its name."""
    if ".lora_A." in name:
        return "A"
    if ".lora_B." in name:
        return "B"
    return HEAD


def select(names: Iterable[str], factors: Factors) -> list[str]:
    """The names whose factor is among ``factors``; a trained head goes with every selection."""
    return [n for n in names if factor_of(n) in factors or factor_of(n) == HEAD]


def set_active(model: nn.Module, factors: Factors) -> dict[str, nn.Parameter]:
    """Let exactly the given factors (and a trained head) require gradients; clear the gradients of all the rest.

    A parameter without a gradient is skipped by torch's optimizers altogether: no step, no momentum, no weight decay.

    Returns:
        The active parameters by name.
    """
    active = {}
    for name, parameter in adapter_parameters(model).items():
        parameter.requires_grad_(factor_of(name) in factors or factor_of(name) == HEAD)
        parameter.grad = None
        if parameter.requires_grad:
            active[name] = parameter
    return active


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters (factors and, if trained, the head) by their names in the model."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name or ".modules_to_save." in name
    }


def digest(state: Mapping[str, torch.Tensor], factors: Factors = BOTH) -> str:
    """SHA-256 over names, shapes and bytes of the given factors: equal on two sites only if the tensors are identical."""
    sha = hashlib.sha256()
    for name in sorted(state):
        if factor_of(name) in factors:
            tensor = state[name].detach().cpu().contiguous()
            sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()
