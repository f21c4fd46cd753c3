"""``lalora audit``: an attack on a run's own code, before or after the run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lalora_flwr.cli.options import ConfigFile, Override, check_out, resolve
from lalora_flwr.ground.errors import ConfigError

REAL = "sites"  # data.name of a run on real nodes


def audit(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run's folder, whose settings are audited.")] = None,
    override: Override = None,
    config: ConfigFile = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File for the result; default: audit.json or membership.json in the run's folder, if one is named."),
    ] = None,
    membership: Annotated[
        bool,
        typer.Option(
            "--membership",
            help="Infer membership from finished adapters instead: RUN's own, or of runs over real records and canaries.",
        ),
    ] = False,
    runs: Annotated[int, typer.Option(help="Runs that --membership trains; without RUN a third of them is attacked.")] = 18,
    workers: Annotated[int, typer.Option(min=0, help="Processes of --membership; 0: as many as the processors carry.")] = 0,
) -> None:
    """Attack the run's own code with records made for it: does what sites let out keep the claimed epsilon?

    Exit 0: the claim survived; 1: it is false, or a contract is broken.
    """
    if membership:
        from lalora_flwr.cli.membership import attack

        attack(run, override, config, out, runs, workers)
        return
    from lalora_flwr.audit.audit import audit as of
    from lalora_flwr.audit.record import FILE, write

    if run and (override or config):
        raise ConfigError("name either a run's folder or settings")
    if run and not (run / "config.toml").is_file():
        raise ConfigError(f"{run}: no run's folder, which would hold config.toml")
    if run:
        config, out = run / "config.toml", out or run / FILE
    check_out(out)
    settings, sizes = resolve(config, override), None
    if run and settings.data.name == REAL:
        sizes = real_sizes(run, settings.train.batch_size)
        settings = dataclasses.replace(settings, num_supernodes=len(sizes))
    found = of(settings, sizes=sizes)
    console = Console(highlight=False)
    rows = {
        "canaries": f"{found.canaries}, about half of them inside {found.sites} sites' records; {found.steps} steps of a site",
        "Clopper-Pearson": f"ε ≥ {found.clopper_pearson:.3g} (decides)",
        "Gaussian pair": f"ε ≈ {found.gaussian_pair:.3g}, at least {found.gaussian_pair_lower:.3g}",
        "one run (Steinke)": f"ε ≥ {found.one_run:.3g}",
        **{f"contract: {name}": fault or "holds" for name, fault in found.contracts.items()},
        "seconds": f"{found.seconds:g}",
    }
    wide = max(map(len, rows))
    for name, text in rows.items():
        console.print(f" {name:{wide}}  {text}", markup=False, soft_wrap=True)
    if out:
        write(found, out)
    console.print(found.sentence, markup=False, soft_wrap=True)
    if not found.survived:
        raise typer.Exit(1)


def real_sizes(run: Path, batch: int) -> dict[int, int]:
    """How many records the sites of a run on real nodes have, which follows from their sampling rates.

    Raises:
        ConfigError: the run has no certificate, or it does not say.
    """
    from lalora_flwr.server.certificate import CERTIFICATE

    try:
        sites = json.loads((run / CERTIFICATE).read_text(encoding="utf-8"))["sites"].values()
        sizes = {number: round(batch / site["steps"][-1][1]) for number, site in enumerate(sites)}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError):
        sizes = {}
    if not sizes:
        raise ConfigError(f"{run}: its {CERTIFICATE} does not say how many records its sites have; name settings with -c instead")
    return sizes
