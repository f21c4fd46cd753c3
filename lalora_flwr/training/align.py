"""An adapter to start from, whose lora_A lie along public texts (`lalora_flwr.adapter.of_inputs`)."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from lalora_flwr.adapter.of_inputs import along_inputs
from lalora_flwr.data.inputs import Inputs
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.processors import processors
from lalora_flwr.methods.method import method_of
from lalora_flwr.models.text import TextModel
from lalora_flwr.settings import Settings
from lalora_flwr.training.learner import ModelStore

FEWEST, MOST = 100, 5000  # texts
AT_ONCE = 32


def read_texts(file: Path) -> list[str]:
    """The first texts of a file with one a line, in UTF-8, without empty ones.

    Raises:
        ConfigError: it cannot be read, or has too few.
    """
    found: list[str] = []
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                if text := line.strip():
                    found.append(text)
                if len(found) == MOST:
                    break
    except (OSError, ValueError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else "no text in UTF-8"
        raise ConfigError(f"{file}: cannot be read: {reason}; name a file with one text a line") from None
    if len(found) < FEWEST:
        raise ConfigError(f"{file}: has {len(found)} texts; {FEWEST} are the fewest that say where inputs vary")
    return found


def align(settings: Settings, texts: Sequence[str], folder: Path) -> None:
    """Write the adapter's folder, which ``lora.start-from`` takes.

    Guarantee: no private record decides a value; where the settings declare no classes, they are read for the names of these.

    Args:
        settings: of the run that is to start from it.
        texts: public ones, as of `read_texts`.
        folder: a new or empty one.

    Raises:
        ConfigError: a folder that is there, another form than ``lora`` or a model that takes images.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is there already; name a new folder")
    if (form := method_of(settings).form) != "lora":
        raise ConfigError(f"lora.form = {form!r}: an adapter of the form lora alone can be aligned; take a strategy of that form")
    if settings.lora.start_from:
        raise ConfigError(f"lora.start-from = {settings.lora.start_from!r}: what is aligned is a new adapter; leave it empty")
    folder = folder.absolute()  # "." has no name
    part = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        part.mkdir(parents=True)  # before the work: a place that cannot be written is told at once
        _write(settings, texts, part)
        if folder.exists():
            folder.rmdir()
        part.replace(folder)
    except OSError as fault:
        raise ConfigError(f"{folder}: cannot be written: {fault.strerror or fault}; name another folder") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(settings: Settings, texts: Sequence[str], folder: Path) -> None:
    torch.set_num_threads(min(settings.train.num_threads, processors()))
    learner = ModelStore().learner(settings)
    base = learner.base
    if not isinstance(base, TextModel):
        raise ConfigError(f"model.name = {settings.model.name!r}: takes images; what an adapter is aligned with are texts")

    def batches() -> Iterable[Inputs]:
        for first in range(0, len(texts), AT_ONCE):
            yield base.padded(texts[first : first + AT_ONCE])

    learner.adapter.load(along_inputs(learner.adapter, base, batches))
    learner.adapter.save(folder)
