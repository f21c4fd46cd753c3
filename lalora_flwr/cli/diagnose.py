"""``lalora diagnose``: what finished runs' updates, noise and loss say of how they were trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def diagnose(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders that hold some.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for diagnosis.json and plots of all runs together; default: each run's own.")
    ] = None,
    over_seeds: Annotated[
        bool, typer.Option("--over-seeds", help="One column for runs that differ in their seed alone: mean ± deviation.")
    ] = False,
    records: Annotated[int, typer.Option(help="Public records at most for curvature and landscape.")] = 256,
    points: Annotated[int, typer.Option(help="Points of a side of the loss landscape, odd; 0: no landscape.")] = 11,
) -> None:
    """Diagnose finished runs: agreement of sites, signal and noise, sharpness, cost. Asks no site and spends no budget."""
    from lalora_flwr.cli.early import check_folder
    from lalora_flwr.cli.plan import print_advice
    from lalora_flwr.diagnose.diagnosis import Effort
    from lalora_flwr.diagnose.diagnosis import diagnose as of
    from lalora_flwr.diagnose.opened import opened
    from lalora_flwr.diagnose.report import chosen, columns_of, named, write
    from lalora_flwr.diagnose.table import Column, markdown
    from lalora_flwr.ground.extras import missing
    from lalora_flwr.ground.figures import MODULE

    if out is not None:
        check_folder(f"--out {out}", out)  # not after hours of work
    effort, console = Effort(records, points), Console(highlight=False)
    results, left_out = chosen(runs)
    names = named(results, over_seeds=over_seeds)
    found = {}
    for name, result in ((name, result) for name, own in names.items() for result in own):
        found[result.path] = of(opened(result.path), effort)
        if out is None:
            write(result.path, [Column(name, (found[result.path],))])
        if len(results) > 1:
            console.print(f"[{len(found)}/{len(results)}] {result.path}", markup=False, soft_wrap=True)
    columns = columns_of(names, found)
    if out is not None:
        write(out, columns)
    console.print(markdown(columns), markup=False, soft_wrap=True)
    print_advice([missing(MODULE, "plots")], console)
    for line in left_out:
        console.print(f"left out: {line}", markup=False, soft_wrap=True)
    where = out if out is not None else results[0].path if len(results) == 1 else "each run's folder"
    console.print(f"diagnosis in {where}", markup=False, soft_wrap=True)
