"""``lalora report``: the tables and plots of a comparison from runs that exist already."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders that hold some.")],
    out: Annotated[Path, typer.Option(help="Folder for results.csv, results.md and plots.")] = Path("report"),
) -> None:
    """Compare finished runs: print the table, and write results.csv, results.md and plots."""
    from lalora_flwr.cli.compare import print_report
    from lalora_flwr.compare.collect import collect
    from lalora_flwr.compare.folder import write_report
    from lalora_flwr.compare.table import markdown

    console = Console(highlight=False)
    found = collect(runs)
    text = markdown(found.results, found.tuning)
    if found.left_out:
        text += "\nLeft out:\n\n" + "".join(f"- {line}\n" for line in found.left_out)
    write_report(out, found.results, text)
    print_report(text, out, console)
