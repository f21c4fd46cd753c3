"""``lalora align``: an adapter to start from, whose lora_A look where public texts vary in the frozen model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lalora_flwr.cli.options import ConfigFile, Override, resolve


def align(
    texts: Annotated[Path, typer.Option(help="Public texts, one a line, in UTF-8; the first 5,000 are read. No labels.")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter; lalora run --from takes it.")],
    config: ConfigFile = None,
    override: Override = None,
) -> None:
    """Write an adapter whose lora_A are the main directions of its layers' inputs on public texts. Costs no privacy."""
    settings = resolve(config, override)
    from lalora_flwr import api

    read = api.align(settings, texts, out)
    Console(highlight=False).print(f"{read} texts; adapter in {out}", markup=False, soft_wrap=True)
