"""``lalora ledger``: make, read and verify the file in which a site keeps its privacy budget."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.waiting import Waiting

if TYPE_CHECKING:
    from lalora_flwr.ledger.content import Content
    from lalora_flwr.ledger.entries import Reserve
    from lalora_flwr.privacy.counting import Compose

app = typer.Typer(help="A site's privacy ledger: the durable file that holds what was spent.", no_args_is_help=True)
File = Annotated[Path, typer.Argument(help="The ledger: the site's ledger-path.", show_default=False)]


@app.command("create")
def create(file: File) -> None:
    """Make an empty ledger. A site without one refuses to train, so that losing it never resets a budget."""
    from lalora_flwr.ledger import file as ledger_file

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
    from lalora_flwr.ledger.file import LedgerFile
    from lalora_flwr.privacy.composition.composer import Composer

    content, console, compose = LedgerFile(file).read(), _console(), Composer()
    console.print(f"{len(content.entries)} entries, head {content.head}")
    if not content.book.datasets:
        console.print("nothing was spent")
    for dataset in content.book.datasets:
        _show_dataset(content, dataset, max_epsilon, delta, compose, console)


def _show_dataset(content: Content, dataset: str, max_epsilon: float, delta: float, compose: Compose, console: Console) -> None:
    rows = _reservations(content, dataset)
    last = rows[-1].entry
    delta = delta or last.delta
    spent = compose(content.book.segments(dataset), delta, last.accountant)
    left = f", {max(0.0, max_epsilon - spent):.4f} left of {max_epsilon:g}" if max_epsilon < math.inf else ""
    steps = sum(row.counted for row in rows)
    console.print(f"\ndataset {dataset}: epsilon {spent:.4f} spent at delta {delta:g} in {steps} steps{left}")
    if (parts := content.book.alone(dataset)) != content.book.segments(dataset):
        worst = compose(parts, delta, last.accountant)
        console.print(f"noise was shared in secure sums: epsilon is {worst:.4f} if all other sites collude")
    runs = Table("run", "strategy", "rounds", "steps", "epsilon of the run's training", box=None, header_style="bold")
    of_run: dict[str, list[_Reservation]] = {}
    for row in rows:
        of_run.setdefault(row.entry.run, []).append(row)
    for run, own in of_run.items():
        alone = compose(content.book.run_segments(dataset, run), delta, last.accountant)
        strategies = ", ".join(dict.fromkeys(row.entry.strategy for row in own))
        rounds = len({row.entry.round for row in own})
        runs.add_row(run, strategies, str(rounds), str(sum(row.counted for row in own)), f"{alone:.4f}")
    console.print(runs)
    names = ("entry", "time", "run", "round", "schedule", "σ", "q", "C", "steps", "epsilon, all until here")
    rounds_table = Table(*names, box=None, header_style="bold")
    for row in rows:
        rounds_table.add_row(*_round(row))
    console.print(rounds_table)


@dataclass(frozen=True)
class _Reservation:
    """A reserve entry, its number, and the steps that its commit says were taken; None if there is no commit."""

    number: int
    entry: Reserve
    taken: int | None

    @property
    def counted(self) -> int:
        return self.entry.steps if self.taken is None else self.taken


def _reservations(content: Content, dataset: str) -> list[_Reservation]:
    from lalora_flwr.ledger.entries import Commit, Reserve

    taken = {entry.reserve: entry.taken for entry in content.entries if isinstance(entry, Commit)}
    return [
        _Reservation(number, entry, taken.get(number))
        for number, entry in enumerate(content.entries)
        if isinstance(entry, Reserve) and entry.dataset == dataset
    ]


def _round(row: _Reservation) -> list[str]:
    entry = row.entry
    steps = f"{row.counted} (not committed)" if row.taken is None else str(row.counted)
    numbers = [f"{entry.sigma:.4g}", f"{entry.q:.4g}", f"{entry.clip_norm:g}", steps, f"{entry.epsilon:.4f} at {entry.delta:g}"]
    return [str(row.number), entry.time, entry.run, str(entry.round), entry.schedule, *numbers]


@app.command("verify")
def verify(
    file: File,
    head: Annotated[str, typer.Option(help="A head noted earlier: it must still be in the ledger.")] = "",
    witness: Annotated[str, typer.Option(help="The site's witness-path: what it saw must still be in the ledger.")] = "",
) -> None:
    """Recompute every hash and every ε, and ε with a second accountant; any difference is one line and exit code 1."""
    from lalora_flwr.ledger.file import LedgerFile
    from lalora_flwr.ledger.verify import verify as check

    console = _console()
    with Waiting(Console(stderr=True), "reading") as waiting:

        def progress(number: int, entries: int) -> None:
            waiting.now(f"epsilon of entry {number} of {entries}")

        verified = check(LedgerFile(file, witness=witness), head, progress=progress)
    console.print(f"good: {len(verified.content.entries)} entries, head {verified.content.head}")
    for dataset, (entry, second) in sorted(verified.last.items()):
        console.print(
            f"dataset {dataset}: epsilon {entry.epsilon:.4f} at delta {entry.delta:g} after its last reservation "
            f"({entry.accountant.upper()}; second accountant: {second:.4f})"
        )


@app.command("witness")
def witness(
    file: File,
    witness: Annotated[
        Path, typer.Option(help="The site's witness-path: a file on another disk or machine.", show_default=False)
    ],
) -> None:
    """Make the file that remembers the ledger's newest entry, after recomputing every hash.

    A site whose node-config names one keeps it itself. This is for a ledger that was used before, or after a witness was
    lost: be sure that the ledger is the newest one, since from then on it is taken as that.
    """
    from lalora_flwr.ledger.file import LedgerFile

    content, console = LedgerFile(file, witness=witness).make_witness(), _console()
    console.print(f"{witness} remembers ledger {content.ledger}: {len(content.entries)} entries, head {content.head}")
    console.print(f'name it in the site\'s node-config: witness-path="{witness.absolute()}"')


@app.command("export")
def export(file: File) -> None:
    """Write every entry as one line of JSON to stdout, after recomputing every hash."""
    from lalora_flwr.ledger.entries import to_dict
    from lalora_flwr.ledger.file import LedgerFile

    content = LedgerFile(file).read()
    for number, (entry, digest) in enumerate(zip(content.entries, content.hashes, strict=True)):
        print(json.dumps({"number": number, "hash": digest, "entry": to_dict(entry)}, sort_keys=True))


def _console() -> Console:
    """Names are no markup, and a table in a pipe keeps one row a line."""
    return Console(soft_wrap=True, highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
