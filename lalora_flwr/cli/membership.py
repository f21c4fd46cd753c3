"""``lalora audit --membership``: who was inside, as far as finished adapters tell."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from lalora_flwr.audit.membership import attack_run, attack_settings
from lalora_flwr.audit.membership_record import FILE, RESOLVED, MembershipRecord
from lalora_flwr.audit.record import write
from lalora_flwr.cli.options import check_out, resolve
from lalora_flwr.ground.errors import ConfigError, Interrupted
from lalora_flwr.ground.waiting import Waiting


def attack(run: Path | None, override: list[str] | None, config: Path | None, out: Path | None, runs: int, workers: int) -> None:
    """Attack a run's adapter, or adapters of runs with the settings, and say what was found.

    Raises:
        ConfigError, RunFailed: as `attack_settings` and `attack_run` have them.
        Interrupted: by the user.
    """
    if run and (override or config):
        raise ConfigError("name either a run's folder or settings")
    out = out or (run / FILE if run and run.is_dir() else None)
    check_out(out)
    console = Console(highlight=False)
    try:
        with Waiting(console, f"training {runs} runs", runs) as waiting:

            def told(done: int) -> None:
                waiting.now(f"training run {min(done + 1, runs)} of {runs}", done)

            if run:
                found = attack_run(run, runs, workers, told)
            else:
                found = attack_settings(resolve(config, override), runs, workers, told)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was written") from None
    _show(found, console)
    if out:
        write(found, out)
    console.print(found.sentence, markup=False, soft_wrap=True)
    if found.refuted:
        raise typer.Exit(1)


def _show(found: MembershipRecord, console: Console) -> None:
    attacked = "the run's own adapter" if found.own_run else f"{found.attacked_runs} runs, members by coin"
    lines = [f"attacked: {attacked}; {found.shadow_runs} shadow runs; {found.seconds:g} seconds"]
    header = (
        "records",
        "attack",
        "members",
        "others",
        "AUC",
        "ε ≥ (independent)",
        "ε ≥ (one run)",
        "true positives at 0.1 % false ones",
    )
    rows = [
        (
            *(one.records, one.attack, str(one.members), str(one.non_members)),
            *(f"{one.auc:.3f}", f"{one.epsilon_if_independent:.3g}"),
            "" if one.epsilon_one_run is None else f"{one.epsilon_one_run:.3g}",
            one.at_few_alarms,
        )
        for one in found.attacks
    ]
    wide = [max(len(row[place]) for row in (header, *rows)) for place in range(len(header))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, wide, strict=True)).rstrip() for row in (header, *rows)]
    if min(one.non_members for one in found.attacks) < RESOLVED:
        lines.append(
            f"0.1 % of fewer than {RESOLVED} non-members is less than one of them, so that the rate is not resolved there"
        )
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
