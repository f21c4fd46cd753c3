"""``lalora ledger``: make, read and verify the file in which a site keeps its privacy budget."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from lalora_flwr.errors import ConfigError
from lalora_flwr.privacy.accounting import epsilon_spent

if TYPE_CHECKING:
    from lalora_flwr.privacy.ledger_book import Reservation
    from lalora_flwr.privacy.ledger_file import Content

app = typer.Typer(help="A site's privacy ledger: the durable file that holds what was spent.", no_args_is_help=True)
File = Annotated[Path, typer.Argument(help="The ledger: the site's ledger-path.", show_default=False)]


@app.command("create")
def create(file: File) -> None:
    """Make an empty ledger. A site without one refuses to train, so that losing it never resets a budget."""
    from lalora_flwr.privacy import ledger_file

    identity = ledger_file.create(file)
    console = _console()
    console.print(f"made {file}, ledger {identity}")
    console.print(f'name it in the site\'s node-config: ledger-path="{file.absolute()}"')


@app.command("show")
def show(
    file: File,
    max_epsilon: Annotated[float, typer.Option(help="The site's max-epsilon; shows what is left of it.")] = math.inf,
    delta: Annotated[float, typer.Option(help="δ of the shown ε; default: that of the dataset's last entry.")] = 0.0,
) -> None:
    """Show ε spent and left, by dataset, run and round, after recomputing every hash."""
    if not max_epsilon > 0:
        raise ConfigError(f"--max-epsilon {max_epsilon:g}: must be a number above 0")
    if not 0 <= delta < 1:
        raise ConfigError(f"--delta {delta:g}: must be a number between 0 and 1")
    from lalora_flwr.privacy.ledger_file import LedgerFile

    content, console = LedgerFile(file).read(), _console()
    console.print(f"{len(content.entries)} entries, head {content.head}")
    if not content.book.datasets:
        console.print("nothing was spent")
    for dataset in content.book.datasets:
        _show_dataset(content, dataset, max_epsilon, delta, console)


def _show_dataset(content: Content, dataset: str, max_epsilon: float, delta: float, console: Console) -> None:
    rows = [(number, r) for number, r in content.book.reservations.items() if r.entry.dataset == dataset]
    last = rows[-1][1].entry
    delta = delta or last.delta
    spent = epsilon_spent(content.book.segments(dataset), delta, last.accountant)
    left = f", {max(0.0, max_epsilon - spent):.4f} left of {max_epsilon:g}" if max_epsilon < math.inf else ""
    steps = sum(r.counted for _, r in rows)
    console.print(f"\ndataset {dataset}: epsilon {spent:.4f} spent at delta {delta:g} in {steps} steps{left}")
    runs = Table("run", "strategy", "rounds", "steps", "epsilon of the run alone", box=None, header_style="bold")
    for run in dict.fromkeys(r.entry.run for _, r in rows):
        own = [r for _, r in rows if r.entry.run == run]
        alone = epsilon_spent(content.book.run_segments(dataset, run), delta, last.accountant)
        strategies = ", ".join(dict.fromkeys(r.entry.strategy for r in own))
        rounds = len({r.entry.round for r in own})
        runs.add_row(run, strategies, str(rounds), str(sum(r.counted for r in own)), f"{alone:.4f}")
    console.print(runs)
    names = ("entry", "time", "run", "round", "schedule", "σ", "q", "C", "steps", "epsilon, all until here")
    rounds_table = Table(*names, box=None, header_style="bold")
    for number, r in rows:
        rounds_table.add_row(str(number), *_round(r))
    console.print(rounds_table)


def _round(r: Reservation) -> list[str]:
    entry = r.entry
    steps = str(r.counted) if r.committed else f"{r.counted} (not committed)"
    numbers = [f"{entry.sigma:.4g}", f"{entry.q:.4g}", f"{entry.clip_norm:g}", steps, f"{entry.epsilon:.4f} at {entry.delta:g}"]
    return [entry.time, entry.run, str(entry.round), entry.schedule, *numbers]


@app.command("verify")
def verify(
    file: File,
    head: Annotated[str, typer.Option(help="A head noted earlier: it must still be in the ledger.")] = "",
) -> None:
    """Recompute every hash and every ε, and ε with a second accountant; any difference is one line and exit code 1."""
    from lalora_flwr.privacy.ledger_check import verify as check
    from lalora_flwr.privacy.ledger_file import LedgerFile

    console = _console()
    with Console(stderr=True).status("reading") as status:
        verified = check(LedgerFile(file), head, progress=lambda number: status.update(f"epsilon of entry {number}"))
    console.print(f"good: {len(verified.content.entries)} entries, head {verified.content.head}")
    for dataset, (entry, second) in sorted(verified.last.items()):
        console.print(
            f"dataset {dataset}: epsilon {entry.epsilon:.4f} at delta {entry.delta:g} after its last reservation "
            f"({entry.accountant.upper()}; second accountant: {second:.4f})"
        )


@app.command("export")
def export(file: File) -> None:
    """Write every entry as one line of JSON to stdout, after recomputing every hash."""
    from lalora_flwr.privacy.ledger_entries import to_dict
    from lalora_flwr.privacy.ledger_file import LedgerFile

    content = LedgerFile(file).read()
    for number, (entry, digest) in enumerate(zip(content.entries, content.hashes, strict=True)):
        print(json.dumps({"number": number, "hash": digest, "entry": to_dict(entry)}, sort_keys=True))


def _console() -> Console:
    """Names are no markup, and a table in a pipe keeps one row a line."""
    return Console(soft_wrap=True, highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
