"""A comparison from its grid to its report: tune, run the winners, write."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from lalora_flwr.compare.cells import Cell, Labels, Plan, Role, unique
from lalora_flwr.compare.folder import RUNS, claim, locked, results_of, save_roles, write_report
from lalora_flwr.compare.live import Progress
from lalora_flwr.compare.pool import Job, Pool, run_cell
from lalora_flwr.compare.results import is_finished, saved_score
from lalora_flwr.compare.table import Tuning, markdown
from lalora_flwr.compare.tuning import Choice, choose_all
from lalora_flwr.ground.errors import RunFailed


@dataclass
class Comparison:
    """One call of ``lalora compare``.

    Args:
        plan: what to run, validated.
        out: the comparison's folder.
        workers: processes at most; 0: as many as the machine carries.
        job: what a worker does with a cell's settings.
    """

    plan: Plan
    out: Path
    workers: int
    console: Console
    job: Job = run_cell
    failures: dict[str, str] = field(default_factory=dict)

    def run(self) -> str:
        """Run what is not finished, write the report and return its Markdown.

        Raises:
            ConfigError: if the folder holds something else.
            RunFailed: if a final run failed or a worker died; what was finished stays, and is not run again.
        """
        with locked(self.out):
            claim(self.plan, self.out)
            grid = self.plan.grid
            roles, choices = self._run_stages()
            save_roles(self.plan, self.out, roles)
            results = results_of(self.out, roles, self.failures)
            text = markdown(results, Tuning(grid.tune, grid.tuning_set) if grid.tune else None)
            write_report(self.out, results, text)
        self._judge(roles, choices)
        return text

    def _run_stages(self) -> tuple[list[Role], dict[Labels, Choice]]:
        plan = self.plan
        tuning = list(plan.tuning)
        cells = unique([*tuning, *self._any_final()])
        share = max(cell.settings.train.num_gpus for cell in cells)
        threads = max(cell.settings.train.num_threads for cell in cells)
        gpus = visible_gpus() if share else []
        size = self.workers or default_workers(share, len(gpus), threads)
        progress = Progress(plan.rows(), len(cells), self.out / RUNS, self.console, min(size, len(cells)))
        with progress, Pool(size, self.out / "workers.log", gpus, self.job) as pool:
            if not tuning:
                self._stage("running", list(plan.final), progress, pool)
                return list(plan.final), {}
            self._stage("tuning", tuning, progress, pool)
            choices = choose_all(tuning, self._scores(tuning), plan.grid.tune)
            final = [role for role in plan.final if role.tuned == choices[role.labels].winner]
            self._stage("final", final, progress, pool)
        return [*tuning, *final], choices

    def _any_final(self) -> list[Role]:
        """As many final roles as there will be: before tuning, those of the first value stand for the winner's."""
        first: dict[Labels, object] = {}
        return [role for role in self.plan.final if first.setdefault(role.labels, role.tuned) == role.tuned]

    def _stage(self, name: str, roles: Sequence[Role], progress: Progress, pool: Pool) -> None:
        save_roles(self.plan, self.out, [*self.plan.tuning, *(role for role in roles if role not in self.plan.tuning)])
        progress.stage(name, roles)
        missing = [cell for cell in unique(roles) if not self._is_done(cell)]
        pool.run(missing, _Recorder(progress, self.failures))

    def _is_done(self, cell: Cell) -> bool:
        return cell.name in self.failures or is_finished(self.out / RUNS / cell.name)

    def _scores(self, roles: Sequence[Role]) -> dict[str, float | None]:
        names = {role.cell.name for role in roles} - set(self.failures)
        return {name: saved_score(self.out / RUNS / name) for name in names}

    def _judge(self, roles: Sequence[Role], choices: dict[Labels, Choice]) -> None:
        """A failed tuning run only loses its value the choice; anything less than all final runs is a failure."""
        final = {role.cell.name for role in roles if role.stage == "final"}
        failed = [name for name in self.failures if name in final]
        lost = [labels for labels, choice in choices.items() if choice.winner is None]
        where = f"the command with --out {self.out} tries them again"
        if failed:
            raise RunFailed(f"{len(failed)} of {len(final)} runs failed, the first with: {self.failures[failed[0]]}; {where}")
        if lost:
            first = next(iter(self.failures.values()), "no run has a finite score")
            raise RunFailed(f"no tuned value works for {len(lost)} of {len(choices)} combinations, the first: {first}; {where}")


@dataclass
class _Recorder:
    """Keeps the reasons of failed cells and passes all on."""

    progress: Progress
    failures: dict[str, str]

    def started(self, cell: Cell) -> None:
        self.progress.started(cell)

    def ended(self, cell: Cell, failure: str | None) -> None:
        if failure is not None:
            self.failures[cell.name] = failure
        self.progress.ended(cell, failure)

    def tick(self) -> None:
        self.progress.tick()


def visible_gpus() -> list[str]:
    """The GPUs of this process as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[: torch.cuda.device_count()] or [str(index) for index in range(torch.cuda.device_count())]


def default_workers(share: float, gpus: int, threads: int) -> int:
    """Processes that the machine carries: by GPU share where runs reserve one, else by CPU threads."""
    if share > 0:
        return max(1, int(gpus / share))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // threads)
