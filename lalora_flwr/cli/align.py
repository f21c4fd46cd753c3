"""``lalora align``: an adapter to start from, whose lora_A looks where public texts vary in the frozen model."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lalora_flwr.cli.options import ConfigFile, Override, resolve
from lalora_flwr.ground.errors import ConfigError

if TYPE_CHECKING:
    from lalora_flwr.data.inputs import Inputs

FEWEST, MOST, AT_ONCE = 100, 5000, 32


def align(
    texts: Annotated[Path, typer.Option(help="Public texts, one a line, in UTF-8; the first 5,000 are read. No labels.")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter; lalora run --from takes it.")],
    config: ConfigFile = None,
    override: Override = None,
) -> None:
    """Write an adapter whose lora_A are the main directions of its layers' inputs on public texts. Costs no privacy."""
    settings = resolve(config, override)
    lines = _read(texts)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: is there already; name a new folder")
    import torch

    from lalora_flwr.adapter.of_inputs import along_inputs
    from lalora_flwr.ground.processors import processors
    from lalora_flwr.methods.method import method_of
    from lalora_flwr.models.text import TextModel
    from lalora_flwr.training.learner import ModelStore

    if (form := method_of(settings).form) != "lora":
        raise ConfigError(f"lora.form = {form!r}: has no lora_A to align; take lora")
    torch.set_num_threads(min(settings.train.num_threads, processors()))
    learner = ModelStore().learner(settings)
    base = learner.base
    if not isinstance(base, TextModel):
        raise ConfigError(f"model.name = {settings.model.name!r}: takes images; what lalora align reads are texts")

    def batches() -> Iterable[Inputs]:
        for first in range(0, len(lines), AT_ONCE):
            yield base.padded(lines[first : first + AT_ONCE])

    learner.adapter.load(along_inputs(learner.adapter, base, batches))
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        learner.adapter.save(part)
        if out.exists():
            out.rmdir()
        part.replace(out)
    except OSError as fault:
        raise ConfigError(f"--out {out}: cannot be written: {fault.strerror}; name another folder") from None
    Console(highlight=False).print(f"{len(lines)} texts; adapter in {out}", markup=False, soft_wrap=True)


def _read(file: Path) -> list[str]:
    """The texts of a file.

    Raises:
        ConfigError: there are too few, or it cannot be read.
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
        raise ConfigError(f"--texts {file}: cannot be read: {reason}; name a file with one text a line") from None
    if len(found) < FEWEST:
        raise ConfigError(f"--texts {file}: has {len(found)} texts; {FEWEST} are the fewest that say where inputs vary")
    return found
