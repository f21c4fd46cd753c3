"""A comparison's progress: a table that redraws itself on a terminal, one line per finished cell elsewhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lalora_flwr.compare.cells import Cell, Role, tuned_label
from lalora_flwr.compare.results import is_finished, saved_score
from lalora_flwr.ground.waiting import Waiting
from lalora_flwr.server.metrics import HEADLINE_OF, HEADLINES, METRICS


class Progress:
    """Told by the pool what happens; shows it. A context, because a terminal's table has to be taken down again.

    Args:
        rows: the combinations without the seed.
        total: cells of all stages.
        runs: the folder that holds the cells' folders.
    """

    def __init__(self, rows: Sequence[str], total: int, runs: Path, console: Console, workers: int) -> None:
        self._rows, self._total, self._runs, self._console, self._workers = list(rows), total, runs, console, workers
        self._stage = ""
        self._roles: dict[str, list[Role]] = {}  # of the stage, by cell
        self._score: dict[str, float | None] = {}  # of finished cells, by name
        self._failed: set[str] = set()
        self._running: dict[str, tuple[Cell, float]] = {}
        self._seconds: list[float] = []
        self._waiting = Waiting(console, "runs")  # where there is no table that moves
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        else:
            self._waiting.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self.tick()
            self._console.print(self.render())  # what stays: the last state
            self._live.stop()
        else:
            self._waiting.__exit__()

    def stage(self, name: str, roles: Sequence[Role]) -> None:
        """From now on the cells of these roles are run; those that are finished already count as done."""
        self._stage, self._roles = name, {}
        for role in roles:
            self._roles.setdefault(role.cell.name, []).append(role)
        for cell in self._roles:
            if cell not in self._score and is_finished(self._runs / cell):
                self._score[cell] = saved_score(self._runs / cell)
        self.tick()

    def started(self, cell: Cell) -> None:
        self._running[cell.name] = cell, time.monotonic()

    def ended(self, cell: Cell, failure: str | None) -> None:
        seconds = time.monotonic() - self._running.pop(cell.name)[1]
        self._seconds.append(seconds)
        if failure is None:
            self._score[cell.name] = saved_score(self._runs / cell.name)
        else:
            self._failed.add(cell.name)
        self._waiting.now(f"{len(self._score) + len(self._failed)} of {self._total} runs done")
        if self._live is None:
            self._console.print(self._line(cell, failure, seconds), soft_wrap=True, markup=False, highlight=False)

    def tick(self) -> None:
        if self._live:
            self._live.update(self.render(), refresh=True)

    def _line(self, cell: Cell, failure: str | None, seconds: float) -> str:
        said = f"failed: {' '.join(failure.split())}" if failure else f"{_metric([cell])} {_percent(self._score.get(cell.name))}"
        done = len(self._score) + len(self._failed)
        left = self._left()
        return f"[{done}/{self._total}] {self._stage}: {self._name(cell)}: {said} ({seconds:.1f} s{left and f'; {left} left'})"

    def _name(self, cell: Cell) -> str:
        role = self._roles[cell.name][0]
        return f"{role.row}, {f'{tuned_label(role.tuned)}, ' if role.tuned else ''}seed {cell.settings.seed}"

    def _left(self) -> str:
        """A guess from the cells that ended so far; empty while there is none."""
        remaining = self._total - len(self._score) - len(self._failed)
        if not self._seconds or remaining <= 0:
            return ""
        now = time.monotonic()
        spent = sum(now - begun for _, begun in self._running.values())
        seconds = max(0.0, (remaining * statistics.fmean(self._seconds) - spent) / self._workers)
        return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

    def render(self) -> RenderableType:
        """The table and a line for the whole."""
        table = Table(
            "combination",
            "runs",
            _metric([r[0].cell for r in self._roles.values()]),
            "now",
            box=None,
            header_style="bold",
            pad_edge=False,
        )
        rows = self._rows_that_fit()
        for row in rows:
            table.add_row(*self._cells_of(row))
        hidden = len(self._rows) - len(rows)
        done, left = len(self._score) + len(self._failed), self._left()
        total = f"{self._stage}: {done} of {self._total} runs" + (f", {len(self._failed)} failed" if self._failed else "")
        total += f", about {left} left" if left else ""
        return Group(table, Text(total + (f" ({hidden} more rows)" if hidden else ""), style="bold"))

    def _rows_that_fit(self) -> list[str]:
        """All rows, or on a low terminal those at work first and finished ones last."""
        room = max(3, self._console.height - 4)
        if len(self._rows) <= room:
            return self._rows
        at_work = {role.row for cell in self._running for role in self._roles[cell]}
        waiting = {r.row for cell, roles in self._roles.items() if cell not in self._score for r in roles}
        ranked = sorted(self._rows, key=lambda row: (row not in at_work, row not in waiting))
        return sorted(ranked[:room], key=self._rows.index)

    def _cells_of(self, row: str) -> tuple[str, str, str, str]:
        mine = [cell for cell, roles in self._roles.items() if any(role.row == row for role in roles)]
        done = [cell for cell in mine if cell in self._score or cell in self._failed]
        found = [a for cell in mine if (a := self._score.get(cell)) is not None]
        running = [cell for cell in mine if cell in self._running]
        now = "; ".join(self._state(self._running[cell][0]) for cell in running)
        if not running:
            now = "done" if mine and len(done) == len(mine) else "waiting" if mine else ""
        if failed := sum(cell in self._failed for cell in mine):
            now += f", {failed} failed"
        return row, f"{len(done)}/{len(mine)}", _percent(statistics.fmean(found)) if found else "", now

    def _state(self, cell: Cell) -> str:
        """Tuned value, seed and round of a running cell; the round from the lines that the cell has written."""
        try:
            rounds = (self._runs / cell.name / METRICS).read_text(encoding="utf-8").count("\n")
        except OSError:
            rounds = 0
        tuned = self._roles[cell.name][0].tuned
        named = f"{tuned_label(tuned)}, " if tuned else ""
        return f"{named}seed {cell.settings.seed}: round {rounds}/{cell.settings.num_rounds}"


def _metric(cells: Iterable[Cell]) -> str:
    names = dict.fromkeys(HEADLINES[HEADLINE_OF[cell.settings.data.problem_type]] for cell in cells)
    return " or ".join(names) or HEADLINES["accuracy"]


def _percent(score: float | None) -> str:
    return "none" if score is None else f"{100 * score:.1f}"
