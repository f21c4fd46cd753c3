"""``lalora verify``: is a finished run what it claims to be?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.", show_default=False)],
    ledgers: Annotated[list[Path] | None, typer.Argument(metavar="[LEDGER]...", help="Ledgers of its sites.")] = None,
) -> None:
    """Recompute every number and every digest of a run's certificate. Exit 1: something differs; 2: a file is not there."""
    from lalora_flwr.audit.verify import verify as lines

    console = Console(highlight=False)
    for line in lines(run, ledgers or ()):
        console.print(f"ok  {line}", markup=False, soft_wrap=True)
    console.print(f"{run}: good", markup=False, soft_wrap=True)
