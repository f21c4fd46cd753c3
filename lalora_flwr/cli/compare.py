"""``lalora compare``: strategies, ε, seeds, learning rates or any other keys side by side."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lalora_flwr.cli.early import check_folder, check_log, check_machine, without_hub
from lalora_flwr.cli.options import ConfigFile, Override
from lalora_flwr.cli.plan import print_advice
from lalora_flwr.compare.cells import TRACK, Plan
from lalora_flwr.compare.grid import Grid, read_grid
from lalora_flwr.ground.errors import ConfigError, Interrupted
from lalora_flwr.ground.extras import missing
from lalora_flwr.ground.figures import MODULE
from lalora_flwr.ground.files import expanded
from lalora_flwr.server.tracking import check_trackers, dropped
from lalora_flwr.settings import KEYS, Settings


def compare(
    override: Override = None,
    config: ConfigFile = None,
    grid: Annotated[Path | None, typer.Option(help=r"TOML file with config, \[set], \[over], \[tune] and \[tuning].")] = None,
    over: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V1,V2,...", help="Compare these values; repeatable; wins over the file.")
    ] = None,
    tune: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V1,V2,...", help="Choose among these for each combination; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the comparison; one that was stopped goes on.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes at most; 0: as many as CPUs or GPUs carry.")] = 0,
) -> None:
    """Run every combination of the compared keys; results.csv, results.md and plots go to the folder."""
    plan_grid = read_grid(grid, config, override or (), over or (), tune or ())
    if not plan_grid.over and not plan_grid.tune:
        raise ConfigError("nothing to compare: name keys and values in [over] of --grid or with --over")
    folder = expanded(out) if out else _fresh_folder(plan_grid)
    check_folder(f"--out {out}" if out else f"output-dir = {str(folder.parent)!r}", folder)
    check_trackers(Settings(track=str(plan_grid.base.get(TRACK, ""))))
    check_log()
    plan = Plan(plan_grid, folder / "runs", check_machine)
    plan.validate()
    offline = _without_hub(plan)
    from lalora_flwr.compare.runner import Comparison  # once the settings hold

    console = Console(highlight=False)
    console.print(f"comparison in {folder}", soft_wrap=True, markup=False)
    if offline:
        console.print("the hub cannot be reached; what is not in its cache cannot be loaded", markup=False)
    try:
        text = Comparison(plan, folder, workers, console).run()
    except KeyboardInterrupt:
        again = "run the same command again" + ("" if out else f" with --out {folder}")
        raise Interrupted(f"interrupted; {again} to go on") from None
    print_report(text, folder, console)
    _print_dropped(folder / "runs", console)


def _print_dropped(runs: Path, console: Console) -> None:
    """A line for each tracker that some runs went on without."""
    found: dict[str, list[str]] = {}
    for run in sorted(runs.iterdir()):
        for tracker, reason in dropped(run).items():
            found.setdefault(tracker, []).append(f"{run.name}: {reason}")
    for tracker, reasons in found.items():
        line = f"runs that went on without their tracker {tracker}: {len(reasons)}, the first {reasons[0]}"
        console.print(line, soft_wrap=True, markup=False, style="yellow")


def _without_hub(plan: Plan) -> bool:
    """Whether a cell needs the hub and it is out of reach.

    Raises:
        ConfigError: so is a model that its cache does not hold.
    """
    settings = [role.cell.settings for role in (*plan.tuning, *plan.final)]
    return any(without_hub(some) for some in {(s.model, s.data.name, s.data.test): s for s in settings}.values())


def _fresh_folder(grid: Grid) -> Path:
    parent = str(grid.base.get("output-dir", KEYS["output-dir"].default))
    return expanded(parent) / f"compare-{datetime.now():%Y%m%d-%H%M%S}"


def print_report(text: str, folder: Path, console: Console) -> None:
    """The report's text as it is in the file, and where it lies."""
    console.print(text, markup=False, soft_wrap=True)
    print_advice([missing(MODULE, "plots")], console)
    console.print(f"results in {folder}", soft_wrap=True, markup=False)
