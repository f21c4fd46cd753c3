"""LoRA through PEFT.

Names of slots are those of PEFT's adapter folders (``…blocks.0.attn.qkv.lora_A.weight``), so what a run sends, checkpoints
and saves is one naming.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.pytorch_utils import Conv1D

from lalora_flwr.adapter.form import Adapter, AdapterForm
from lalora_flwr.adapter.lora_export import Factors, write_factors
from lalora_flwr.adapter.peft_folder import WRAPPED, finish_folder
from lalora_flwr.adapter.slots import HEAD, LORA_A, LORA_B, Slot
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.base import BaseModel
from lalora_flwr.settings import LoraSettings

TRAINED_HEADS = ("trained", "ridge")  # values of lora.head; the second says where it starts


def short(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def adaptable(model: nn.Module) -> list[str]:
    """Names of the linear layers, transformers' Conv1D among them, which is one with its weight transposed."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)  # PEFT's rule for a list of target modules


def in_head(name: str, head: str, trained: bool) -> bool:
    """Whether a layer belongs to the head. A trained one takes along what ends with its name: DistilBERT's pre_classifier."""
    if not head:
        return False
    return name == head or name.startswith(head + ".") or (trained and name.endswith(head))


def _excluded(head: str, trained: bool) -> str | None:
    """`in_head` as the expression that PEFT takes: a head is trained whole or not at all."""
    if not head:
        return None
    return rf"{'.*' if trained else ''}{re.escape(head)}(\..*)?"


def trains_head(base: BaseModel, lora: LoraSettings) -> bool:
    """Whether the classification head is trained: as ``lora.head`` says, or with ``auto`` if it is new and so knows nothing."""
    return base.fresh_head if lora.head == "auto" else lora.head in TRAINED_HEADS


def resolve_targets(base: BaseModel, lora: LoraSettings) -> list[str]:
    """The module names to adapt, each checked against the model.

    Raises:
        ConfigError: if a target matches no linear layer, listing those the model has.
    """
    targets = list(base.targets) if lora.targets == "auto" else [t.strip() for t in lora.targets.split(",") if t.strip()]
    whole = trains_head(base, lora)
    linear = [name for name in adaptable(base.module) if not in_head(name, base.head, whole)]
    for target in targets or [""]:
        if not any(matches(name, target) for name in linear):
            raise ConfigError(
                f"lora.targets = {lora.targets!r}: {target!r} matches no linear layer of {base.name}; it has "
                f"{short(dict.fromkeys(name.rpartition('.')[2] for name in linear), 20)}"
            )
    return targets


def _refuse_rank(base: BaseModel, lora: LoraSettings, targets: Iterable[str]) -> None:
    """A rank above the smaller side of a layer holds more numbers than the layer and can express no more."""
    named = [(name, module) for name, module in base.module.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    sides = {name: min(module.weight.shape) for name, module in named if any(matches(name, target) for target in targets)}
    widest = max(sides, key=lambda name: sides[name])
    if lora.rank > sides[widest]:
        raise ConfigError(f"lora.rank = {lora.rank}: above the smaller side of every layer it adapts, at most {sides[widest]}")


def refuse_batch_norm(base: BaseModel) -> None:
    """
    Raises:
        ConfigError: the model's records do not keep to themselves.
    """
    # BatchNorm under any name: EvoNorm's batch variants keep a running variance too
    mixing = [name for name, m in base.module.named_modules() if isinstance(m, _BatchNorm) or hasattr(m, "running_var")]
    if mixing:
        raise ConfigError(
            f"model.name = {base.name!r}: BatchNorm ({short(mixing, 3)}) mixes the records of a batch, so no record's "
            "gradient is its own; choose a model without BatchNorm"
        )


class LoraAdapter(Adapter):
    """Factors of PEFT's LoRA layers, and the modules of a trained head."""

    model: PeftModel
    in_peft = True

    def __init__(self, model: PeftModel, base: BaseModel, lora: LoraSettings) -> None:
        self._base, self._trained = base, trains_head(base, lora)
        self._scale = lora.rank / lora.alpha
        slots, self.of_base = {}, {}
        for slot, parameter, own in _slots(model, self.roles):
            slots[slot] = parameter
            if own:
                self.of_base[own] = slot.name
        super().__init__(model, slots)

    def roles(self, name: str, layer: str, module: LoraLayer) -> Iterator[tuple[Slot, nn.Parameter]]:
        """The slots of an adapted layer and their parameters.

        Args:
            name: of the layer in the model with its adapter.
            layer: in the base model.
            module: PEFT's layer.
        """
        for part, axis in ((LORA_A, 1), (LORA_B, 0)):
            weight = getattr(module, part)[DEFAULT].weight
            yield Slot(f"{name}.{part}.weight", layer, part, tuple(weight.shape), axis), weight

    @torch.no_grad()
    def stir(self, generator: torch.Generator) -> None:
        """Give B values for which the adapter's share is of the same size whatever alpha and rank are."""
        for name in self.layout:
            if self.layout[name].part == LORA_B:
                parameter = self.parameters[name]
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.2 * self._scale))

    def save(self, folder: Path) -> None:
        """A folder that ``PeftModel.from_pretrained`` loads; see `finish_folder`."""
        self.save_as_lora(folder)

    def save_as_lora(self, folder: Path, factors: Mapping[str, Factors] | None = None) -> None:
        """The folder, of a form of LoRA's with the factors that say the same as it, by layer; none: PEFT's own."""
        self.model.save_pretrained(str(folder), save_embedding_layers=False)
        if factors is not None:
            write_factors(folder, factors, 1 / self._scale, self._base.published.inside)
        finish_folder(folder, self._base, trained=self._trained)


class Lora(AdapterForm):
    """LoRA (arXiv 2106.09685) through PEFT: A Kaiming-uniform from the seed, B zero.

    A trained head belongs to the adapter (`trains_head`); the seed also draws it if the published weights have none.

    Attributes:
        adapter_type: of what is attached.
    """

    gate = LORA_B
    parts = frozenset({LORA_A, LORA_B})
    unused = frozenset({"size"})
    adapter_type: type[LoraAdapter] = LoraAdapter

    def extend(self, module: LoraLayer) -> None:
        """Change a layer of PEFT's before its slots are named; for forms derived from this one."""

    def start(self, module: LoraLayer) -> None:
        """Give a layer its first values, drawn from the global generator in float32 on the CPU."""
        A = module.lora_A[DEFAULT]
        assert isinstance(A, nn.Linear)
        A.weight.copy_(nn.Linear(A.in_features, A.out_features, bias=False).weight)

    def attach(self, base: BaseModel, settings: LoraSettings, seed: int) -> LoraAdapter:
        """As `AdapterForm.attach`.

        Raises:
            ConfigError: no target matched, a target holds part of the head, there is no head to train, or the model has
                BatchNorm.
        """
        refuse_batch_norm(base)
        trained = trains_head(base, settings)
        if settings.head in TRAINED_HEADS and not base.head:
            raise ConfigError(f"lora.head = {settings.head!r}: {base.name} has no classification head here; leave it frozen")
        targets = resolve_targets(base, settings)
        _refuse_rank(base, settings, targets)
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT divides by the rank; a float is fine
            target_modules=targets,
            exclude_modules=_excluded(base.head, trained),
            lora_dropout=settings.dropout,
            fan_in_fan_out=any(isinstance(m, Conv1D) for m in base.module.modules()),  # PEFT would find out, and warn
            modules_to_save=[base.head] if trained else None,
        )
        with torch.random.fork_rng(devices=[]):  # PEFT draws values of its own, which are replaced below
            model = get_peft_model(base.module, config)
        assert isinstance(model, PeftModel)
        for module in [module for module in model.modules() if isinstance(module, LoraLayer)]:
            self.extend(module)
        adapter = self.adapter_type(model, base, settings)
        for parameter in adapter.parameters.values():  # PEFT leaves a trained head in the base's precision
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        if not any(parameter.is_meta for parameter in model.parameters()):
            _start(model, base, seed, self.start)
        return adapter


LORA = Lora()
DEFAULT = "default"  # the name under which PEFT keeps a model's only adapter


Roles = Callable[[str, str, LoraLayer], Iterable[tuple[Slot, nn.Parameter]]]


def _slots(model: PeftModel, of_layer: Roles) -> Iterator[tuple[Slot, nn.Parameter, str]]:
    """What PEFT trains, in the order of the model, under the names of PEFT's own adapter folders.

    With each, its name in the base model if it takes the place of a tensor there.
    """
    roles: dict[int, tuple[Slot, str]] = {}
    for name, module in model.named_modules():
        layer = name.removeprefix(WRAPPED)
        if isinstance(module, LoraLayer):
            roles.update({id(weight): (slot, "") for slot, weight in of_layer(name, layer, module)})
        elif isinstance(module, ModulesToSaveWrapper):
            for own, weight in module.modules_to_save[DEFAULT].named_parameters():
                roles[id(weight)] = Slot(f"{name}.{own}", layer, HEAD, tuple(weight.shape)), f"{layer}.{own}"
    for parameter in model.parameters():
        if id(parameter) in roles:
            slot, own = roles[id(parameter)]
            yield slot, parameter, own


@torch.no_grad()
def _start(model: PeftModel, base: BaseModel, seed: int, start: Callable[[LoraLayer], None]) -> None:
    """Give the adapter its first values, drawn in float32 on the CPU: no site's precision or device may show in them."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                start(module)
            elif isinstance(module, ModulesToSaveWrapper):
                head = module.modules_to_save[DEFAULT]
                head.load_state_dict(base.head_weights.get(name.removeprefix(WRAPPED), head.state_dict()))
                if base.fresh_head:
                    head.load_state_dict(redrawn(head).state_dict())


def redrawn(module: nn.Module) -> nn.Module:
    """A copy of a head in float32 on the CPU, with values drawn from the global generator."""
    drawn = copy.deepcopy(module).to("cpu", torch.float32)
    for part in drawn.modules():
        if callable(reset := getattr(part, "reset_parameters", None)):
            reset()
    return drawn
