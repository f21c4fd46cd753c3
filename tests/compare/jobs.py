"""Stand-ins for a run, in a module that worker processes can import. They write what a run writes, from its settings."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from lalora_flwr.ground.errors import RunFailed
from lalora_flwr.server.folder import RunFolder
from lalora_flwr.settings import settings_from
from tests.compare.made import accuracy_for, lines_for, summary_for

TRACE = "trace.txt"  # in the comparison's folder: one line a cell, by process


def pretend(values: dict[str, Any]) -> None:
    """A run of no time whose accuracy is `accuracy_for` its settings."""
    settings = settings_from(values)
    with (Path(values["output-dir"]).parent / TRACE).open("a") as trace:
        trace.write(f"{os.getpid()} {values['run-name']} {values['model.name']}\n")
    folder = RunFolder(settings)
    accuracy = accuracy_for(values)
    for line in lines_for(values, accuracy):
        folder.add_metrics(line)
    folder.finish(summary_for(values, accuracy))


def fail_seed_1(values: dict[str, Any]) -> None:
    """Seed 1 stops in the middle, as a run that diverged."""
    if values["seed"] == 1:
        RunFolder(settings_from(values)).fail("round 1: diverged")
        raise RunFailed("round 1: diverged")
    pretend(values)


def fail_high_lr(values: dict[str, Any]) -> None:
    """A learning rate of 1 diverges, above it is a plain error of a library."""
    if values["train.lr"] > 1:
        raise ValueError("first line\nsecond line")
    if values["train.lr"] == 1:
        raise RunFailed("diverged")
    pretend(values)


def die_at_seed_1(values: dict[str, Any]) -> None:
    """Seed 1 takes its process down after the first round, if the environment says so."""
    if values["seed"] == 1 and "LALORA_TEST_DIE" in os.environ:
        RunFolder(settings_from(values)).add_metrics(lines_for(values, 0.5)[0])
        os._exit(7)
    pretend(values)


def interrupt_parent(values: dict[str, Any]) -> None:
    """Ctrl-C, as a terminal sends it to the whole group, while this run would take a minute."""
    with (Path(values["output-dir"]).parent / TRACE).open("a") as trace:
        trace.write(f"{os.getpid()}\n")
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
