"""Worker processes, each of which runs one cell after the other and keeps the base model it has loaded."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from lalora_flwr.compare.cells import Cell
from lalora_flwr.ground.errors import LaloraError, RunFailed
from lalora_flwr.server.metrics import RoundMetrics
from lalora_flwr.settings import Value, flatten, settings_from

TICK = 0.5  # seconds between two looks at the running cells
Values = dict[str, Value]  # a run's settings, flat
Job = Callable[[Values], None]


class Watcher(Protocol):
    """Who is told what happens to the cells."""

    def started(self, cell: Cell) -> None: ...

    def ended(self, cell: Cell, failure: str | None) -> None: ...

    def tick(self) -> None: ...


@dataclass
class Worker:
    """A process and the cell it has in hand."""

    process: BaseProcess
    pipe: connection.Connection
    cell: Cell | None = None
    group: str = ""


def run_cell(values: Values) -> None:
    """Run one cell in this process.

    Raises:
        ConfigError, RunFailed: as `run_inline`.
    """
    from lalora_flwr.engines.inline import run_inline

    parent = os.getppid()

    def leave_with_parent(_: RoundMetrics) -> None:
        if os.getppid() != parent:  # killed: nobody waits, and the same command may be at work again
            os._exit(1)

    run_inline(settings_from(values), leave_with_parent)


def work(pipe: connection.Connection, job: Job, log: str, env: Mapping[str, str]) -> None:
    """A worker's life: cells come in through the pipe, a reason or None goes out, and a closed pipe is the end."""
    os.environ.update(env)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)  # what libraries print would tear the table on the console
    os.dup2(out, 2)
    while True:
        try:
            values = pipe.recv()
        except EOFError:
            return
        shutil.rmtree(Path(values["output-dir"]) / values["run-name"], ignore_errors=True)  # an earlier attempt's
        try:
            job(values)
            reason = None
        except LaloraError as error:
            reason = str(error)
        except Exception as error:
            reason = f"unexpected {type(error).__name__}: {error}"
        sys.stderr.flush()
        pipe.send(reason)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Processes started inside inherit a blocked Ctrl-C: they leave it to this one, which ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass
class Pool:
    """Up to ``size`` workers; a context that ends them all."""

    size: int
    log: Path
    gpus: Sequence[str] = ()  # names for CUDA_VISIBLE_DEVICES, dealt out to the workers in turn
    job: Job = run_cell
    workers: list[Worker] = field(default_factory=list)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.process.kill() if worker.cell else worker.pipe.close()
        for worker in self.workers:
            worker.process.join(5)
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()

    def run(self, cells: Sequence[Cell], watcher: Watcher) -> None:
        """Run the cells; one that fails is told to the watcher, and the rest goes on.

        Raises:
            RunFailed: if a worker died. What it had in hand has no summary, and so counts as not run.
        """
        pending = list(cells)
        while len(self.workers) < min(self.size, len(pending)):
            self.workers.append(self._start(len(self.workers)))
        for worker in self.workers:
            self._hand(worker, pending, watcher)
        while busy := [worker for worker in self.workers if worker.cell]:
            ready = connection.wait([worker.pipe for worker in busy], timeout=TICK)
            for worker in busy:
                if worker.pipe in ready:
                    self._collect(worker, watcher)
                    self._hand(worker, pending, watcher)
            watcher.tick()

    def _start(self, index: int) -> Worker:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        env = {"CUDA_VISIBLE_DEVICES": self.gpus[index % len(self.gpus)]} if self.gpus else {}
        process = context.Process(target=work, args=(theirs, self.job, str(self.log), env), name=f"compare-{index}")
        with _no_interrupt():
            process.start()
        theirs.close()  # the worker's own copy is the last one, so that its death closes the pipe
        return Worker(process, ours)

    def _hand(self, worker: Worker, pending: list[Cell], watcher: Watcher) -> None:
        """The next cell: best of the group the worker has loaded, else of one that no other worker is at."""
        if not pending:
            return
        others = {other.group for other in self.workers if other is not worker}
        cell = min(pending, key=lambda c: (c.group != worker.group, c.group in others))  # min keeps the order otherwise
        pending.remove(cell)
        worker.cell, worker.group = cell, cell.group
        try:
            worker.pipe.send(flatten(cell.settings))
        except OSError:  # it died between two cells
            self._died(worker)
        watcher.started(cell)

    def _collect(self, worker: Worker, watcher: Watcher) -> None:
        assert worker.cell is not None
        try:
            reason = worker.pipe.recv()
        except (EOFError, OSError):
            self._died(worker)
        cell, worker.cell = worker.cell, None
        watcher.ended(cell, reason)

    def _died(self, worker: Worker) -> None:
        assert worker.cell is not None
        worker.process.join(5)
        raise RunFailed(
            f"a worker died (exit code {worker.process.exitcode}) in {worker.cell.name}, perhaps for lack of memory: "
            f"run the same command again to go on, with fewer --workers if it recurs ({self.log} has what it printed)"
        )
