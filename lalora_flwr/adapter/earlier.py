"""Start from an adapter that an earlier run saved."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lalora_flwr.adapter.form import Adapter
from lalora_flwr.adapter.lora_export import OF_LORA
from lalora_flwr.adapter.peft_folder import WRAPPED, head_tensors
from lalora_flwr.adapter.saved import CONFIG, HEAD_FILE, KEY, WEIGHTS, weights_of
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.files import expanded, file_digest
from lalora_flwr.models.base import BaseModel
from lalora_flwr.settings import LoraSettings
from lalora_flwr.wire.tensors import LARGEST

OTHERWISE = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")  # by which PEFT's scale is not alpha / rank everywhere


def load_earlier(adapter: Adapter, base: BaseModel, lora: LoraSettings) -> str:
    """Put the values of ``lora.start-from`` into an adapter, if it names any; SHA-256 of the file that holds them.

    Raises:
        ConfigError: as `earlier`.
    """
    if not lora.start_from:
        return ""
    adapter.load(earlier(adapter, base, lora))
    return file_digest(weights_of(expanded(lora.start_from)))


def earlier(adapter: Adapter, base: BaseModel, lora: LoraSettings) -> dict[str, Tensor]:
    """The values of ``lora.start-from`` for the slots of an adapter; those that only the server changes may be missing.

    Args:
        adapter: with the run's first values.
        base: of the adapter.
        lora: the ``lora.*`` keys of the run.

    Raises:
        ConfigError: the folder's adapter is of another form, shape, scale or head.
    """
    file = weights_of(expanded(lora.start_from))
    found = dict(_named(file, base, adapter))
    _check_scale(file.parent / CONFIG, lora)
    state = {}
    for name, slot in adapter.layout.items():
        value = found.pop(name, None)
        if value is None and not slot.frozen:
            raise ConfigError(
                f"{KEY} = {lora.start_from!r}: holds no {name}; the run must have the form, targets and head of the adapter"
            )
        if value is None:
            continue
        if tuple(value.shape) != slot.shape:
            raise ConfigError(
                f"{KEY} = {lora.start_from!r}: {name} is {tuple(value.shape)} there and {slot.shape} in the run; "
                "give the run the rank and classes of the adapter"
            )
        if not (value.abs() <= LARGEST).all():  # NaN is not <= either
            raise ConfigError(
                f"{KEY} = {lora.start_from!r}: {name} holds numbers that are not finite, or above {LARGEST:g}, as sites refuse"
            )
        state[name] = value
    _check_rest(found, base, lora)
    return state


def _named(file: Path, base: BaseModel, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder under the names of the run's slots: those of a wrapped model leave out where it is wrapped."""
    inside, head = base.published.inside, base.head
    try:
        tensors = _widened(load_file(file))
        heads = _widened(load_file(path)) if (path := file.parent / HEAD_FILE).is_file() else {}
    except Exception as error:  # safetensors has its own, of no common class
        raise ConfigError(f"{KEY}: {file.parent} is damaged: {type(error).__name__}") from None
    if wrong := [name for name, value in (*tensors.items(), *heads.items()) if not value.is_floating_point()]:
        raise ConfigError(f"{KEY}: {file.parent} is damaged: {wrong[0]} holds no floating-point numbers")
    for name, value in tensors.items():
        bare = name.removeprefix(WRAPPED)
        start = name.removesuffix(bare)
        longer = f"{start}{inside}{bare}"
        yield (longer if inside and longer in adapter.layout else name), value
    for name, value in heads.items():
        own = name if name.startswith(f"{head}.") else f"{head}.{name}"
        wrapped = f"{WRAPPED}{own}"
        yield (wrapped if wrapped in adapter.layout else own), value


def _widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point numbers as float32, which torch does not make of all that safetensors holds."""
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def _check_scale(config: Path, lora: LoraSettings) -> None:
    """Refuse what PEFT computes otherwise than this run would."""
    if not config.is_file():
        if (config.parent / WEIGHTS).is_file():
            raise ConfigError(f"{KEY} = {lora.start_from!r}: lacks {CONFIG}, which says how the adapter is scaled")
        return
    try:
        about = json.loads(config.read_text(encoding="utf-8"))
        kind, scaled = about["peft_type"], any(about.get(key) for key in OTHERWISE)
        scale = about["lora_alpha"] / about["r"] if kind == "LORA" else 0.0
        if not math.isfinite(scale):
            raise ValueError("no scale")
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError, OSError):
        raise ConfigError(f"{KEY}: {config} is no configuration of an adapter") from None
    if kind == "LORA" and scaled:
        raise ConfigError(f"{KEY} = {lora.start_from!r}: no plain LoRA of one rank and scale, so no start for a run")
    if kind == "LORA" and abs(scale - lora.alpha / lora.rank) > 1e-6 * abs(scale):
        raise ConfigError(
            f"{KEY} = {lora.start_from!r}: is scaled by alpha / rank = {scale:g}, the run by {lora.alpha / lora.rank:g}; "
            f"set lora.alpha = {scale * lora.rank:g}"
        )


def _check_rest(rest: Mapping[str, Tensor], base: BaseModel, lora: LoraSettings) -> None:
    """Refuse tensors for which the run has no place; a head that is the frozen model's own needs none."""
    own = head_tensors(base)
    for name, value in rest.items():
        if OF_LORA in name:
            raise ConfigError(f"{KEY} = {lora.start_from!r}: adapts {name}, which the run does not; set lora.targets as it was")
        frozen = own.get(name.removeprefix(WRAPPED))
        if frozen is None or frozen.shape != value.shape or not torch.equal(frozen, value):
            raise ConfigError(
                f"{KEY} = {lora.start_from!r}: brings {name}, which the run keeps as it is; set lora.head = 'trained'"
            )
