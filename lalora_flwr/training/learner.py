"""A base model with its adapter and gradient engine, ready to train; base models are loaded once."""

from __future__ import annotations

import copy
import dataclasses
import logging
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from lalora_flwr.adapter.form import Adapter, AdapterForm
from lalora_flwr.adapter.peft_folder import head_modules
from lalora_flwr.data.data_set import Facts, facts
from lalora_flwr.data.inputs import Inputs
from lalora_flwr.gradients.dropout import remove_dropout
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.gradients.self_check import check_precision, self_check
from lalora_flwr.ground.hardware import choose_device, choose_dtype
from lalora_flwr.ground.malloc import keep_freed_memory
from lalora_flwr.ground.seeds import derive_seed
from lalora_flwr.methods.method import method_of
from lalora_flwr.models import load_base_model
from lalora_flwr.models.base import BaseModel
from lalora_flwr.models.four_bits import NF4, in_four_bits
from lalora_flwr.settings import LoraSettings, ModelSettings, Settings
from lalora_flwr.settings.choices import FORMS

log = logging.getLogger("lalora_flwr.site")
CHOSEN = ("bfloat16", NF4)  # by somebody; auto takes low precision where it is known to do


@dataclass(frozen=True)
class Learner:
    """A model that one owner trains or evaluates.

    Attributes:
        base: what the model is.
        adapter: what is trained; its values are the owner's business, load them before use. Whoever changes the mode of its model
            does so for all of it.
        engine: gives each record's gradients.
        initial: the adapter as drawn from the run's seed, the same in every process.
    """

    base: BaseModel
    adapter: Adapter
    engine: PerSampleGradients
    initial: dict[str, Tensor]

    def gradients(self, inputs: Inputs, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Each record's gradients of the active slots, (records, *shape) by name, and its loss, (records,). Both are raw.

        Args:
            inputs, labels: of at least one record, where the adapter computes.
        """
        seen: list[Tensor] = []

        def losses() -> Tensor:
            seen.append(self.adapter.losses(self.base, inputs, labels))
            return seen[-1]

        return self.engine(len(labels), losses), seen[-1].detach()


@dataclass(frozen=True)
class Wanted:
    """All that decides what a learner is."""

    model: ModelSettings
    about: Facts
    max_tokens: int
    answer: str
    form: str
    lora: LoraSettings
    seed: int
    checkpointing: bool
    device: torch.device


class ModelStore:
    """Base models of a process, the last one kept in memory; all learners made from it share its frozen weights.

    Two owners in one process, as the server and the sites of the inline engine, each have a learner of their own, and the
    weights are there once. The check before training runs once for all learners that are alike.
    """

    def __init__(self) -> None:
        self._base = lru_cache(maxsize=1)(_load_base)  # by everything that decides the weights, their precision and place
        self._checked: set[Wanted] = set()

    def learner(self, settings: Settings, device: str = "") -> Learner:
        """A learner for the run, checked and with its first adapter.

        Args:
            settings: the run's settings.
            device: where to compute, as ``train.device``, which it overrides; a site's own word.

        Raises:
            ConfigError: the model cannot be used (no target matched, BatchNorm, records that are not independent, …).
        """
        return self.make(wanted(settings, device))

    def make(self, wanted: Wanted) -> Learner:
        """A new learner, with modules of its own."""
        keep_freed_memory()
        base = sharing_weights(self._base(wanted.model, wanted.about, wanted.max_tokens, wanted.answer, wanted.device))
        remove_dropout(base.module)  # of the frozen weights: it would only add noise to the noise, and memory; lora.dropout stays
        if wanted.checkpointing:
            base.checkpoint_activations()
        adapter = FORMS.get(wanted.form, AdapterForm).attach(base, wanted.lora, derive_seed(wanted.seed, "adapter"))
        adapter.model.to(wanted.device)
        engine = PerSampleGradients(adapter.model, adapter.parameters)
        adapter.model.train()  # all of its parts, so that from here on its own mode is theirs
        if wanted not in self._checked:
            self_check(base, adapter, engine)
            if wanted.model.dtype in CHOSEN:
                off = check_precision(base, adapter, engine, wanted.model.dtype)
                log.info("%s: gradients of made-up records are off by %.1f %% of their norm", wanted.model.dtype, 100 * off)
            self._checked.add(wanted)
        return Learner(base, adapter, engine, adapter.state())


class LearnerCache:
    """The last learner of one owner, so that a process which serves round after round makes it once."""

    def __init__(self, models: ModelStore) -> None:
        self._learner = lru_cache(maxsize=1)(models.make)  # by everything that decides what a learner is

    def learner(self, settings: Settings, device: str = "") -> Learner:
        """As `ModelStore.learner`, but the same object for the same settings: load an adapter before use."""
        return self._learner(wanted(settings, device))


def wanted(settings: Settings, device: str) -> Wanted:
    return Wanted(
        settings.model,
        facts(settings),
        settings.data.max_tokens,
        settings.data.answer,
        method_of(settings).form,
        settings.lora,
        settings.seed,
        settings.train.gradient_checkpointing,
        choose_device(device or settings.train.device),
    )


def _load_base(model: ModelSettings, about: Facts, max_tokens: int, answer: str, device: torch.device) -> BaseModel:
    base = load_base_model(model, about, max_tokens, answer)
    base.module.requires_grad_(False)
    return cast_base(base, device, choose_dtype(model.dtype, device), four_bits=model.dtype == NF4)


def cast_base(base: BaseModel, device: torch.device, dtype: torch.dtype, *, four_bits: bool = False) -> BaseModel:
    """The base on a device and in a precision; a trained head starts from the published values all the same.

    Args:
        base: as it was loaded.
        device, dtype: where, and what its weights are kept in.
        four_bits: its linear layers are kept in four bits, and ``dtype`` is that of the rest and of all products.

    Raises:
        ConfigError: it has no layers that can be.
    """
    kept = {name: _in_full(module) for name, module in head_modules(base).items()}
    if four_bits:
        base = in_four_bits(base)  # before it goes to a device that may have no room for the rest
    base.module.to(device, dtype)  # before the adapter, whose factors stay float32
    return dataclasses.replace(base, head_weights=kept)


def _in_full(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict().items()
    return {name: t.detach().to(torch.promote_types(t.dtype, torch.float32), copy=True) for name, t in state}


def sharing_weights(base: BaseModel) -> BaseModel:
    """A copy whose modules are its own and whose weights are the original's: an adapter can be put on it and thrown away."""
    tensors: list[Tensor | nn.Parameter] = [*base.module.parameters(), *base.module.buffers()]
    return dataclasses.replace(base, module=copy.deepcopy(base.module, {id(tensor): tensor for tensor in tensors}))
