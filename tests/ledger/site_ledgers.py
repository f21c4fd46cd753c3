"""Ledgers for tests, and a cheap ε that composes without summing: √(Σ steps · (q / σ)²)."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

from flwr.app import Context

from lalora_flwr.ledger.database import SCHEMA
from lalora_flwr.ledger.entries import clock
from lalora_flwr.ledger.file import LedgerFile, create
from lalora_flwr.ledger.site_ledger import Request, SiteLedger
from lalora_flwr.privacy.accounting import HEADLINE
from lalora_flwr.privacy.events import SampledGaussian, Target

DELTA = 1e-5
DIGITS_SITE: dict[str, Any] = {  # what the owner of a share of the digits says
    "max-epsilon": 50.0,
    "delta": 1e-3,
    "num-records": 300,
    "allow-run-model": True,
    "task": "image",
    "labels": "0,1,2,3,4,5,6,7,8,9",
    "answer-seconds": 0,
}
TRIGGERS = [name for name, sql in SCHEMA.items() if sql.startswith("CREATE TRIGGER")]


def compose(history: Sequence[SampledGaussian], delta: float, accountant: str) -> float:
    """Rises with every step, knows no order, and the whole is less than the sum of its parts."""
    return math.sqrt(sum(steps * (q / sigma) ** 2 for sigma, q, steps in history))


def target(epsilon: float = 1e6, steps: int = 10**9, accountant: str = HEADLINE) -> Target:
    return Target(epsilon, DELTA, steps, accountant)


def request(**changed: Any) -> Request:
    values: dict[str, Any] = {
        "run": "1",
        "strategy": "la-lora",
        "server_round": 1,
        "schedule": "step:BA",
        "dataset": "default",
        "clip_norm": 1.0,
        "target": target(),
    }
    return Request(**{**values, **changed})


def session(
    path: Path,
    max_epsilon: float = 1e6,
    *,
    fingerprint: str = "",
    busy: float = 5.0,
    witness: Path | str = "",
    queries: float = math.inf,
    at: datetime | None = None,
    **changed: Any,
) -> SiteLedger:
    """The ledger of one round, as a new process would open it; ``at`` stops its clock."""
    asked, time = request(**changed), (lambda: at) if at else clock
    file = LedgerFile(path, busy, witness=witness)
    ledger = SiteLedger(file, asked, max_epsilon, DELTA, compose, max_queries_per_day=queries, clock=time)
    ledger.identify(fingerprint or f"records of {asked.dataset}")
    return ledger


def new_ledger(folder: Path) -> Path:
    path = folder / "ledger"
    create(path)
    return path


def serve(path: Path, sigma: float = 1.0, q: float = 0.1, steps: int = 3, taken: int | None = None, **changed: Any) -> None:
    """One whole round."""
    ledger = session(path, **changed)
    ledger.reserve(sigma, q, steps)
    for _ in range(steps if taken is None else taken):
        ledger.take_step()
    ledger.commit()


def forge(path: Path, *statements: tuple[str, Sequence[Any]]) -> None:
    """Change a ledger as somebody would who knows SQLite: triggers off, change, triggers on."""
    with closing(sqlite3.connect(path)) as connection:
        for name in TRIGGERS:
            connection.execute(f"DROP TRIGGER {name}")
        for sql, arguments in statements:
            connection.execute(sql, arguments)
        for name in TRIGGERS:
            connection.execute(SCHEMA[name])
        connection.commit()


def owned(context: Context, folder: Path, run_id: int = 1, **changed: Any) -> Context:
    """The context as that of a real site whose owner made a ledger and sets caps."""
    context.run_id = run_id
    if not (path := folder / "own-ledger").exists():
        create(path)
    context.node_config.update({"ledger-path": str(path), **DIGITS_SITE, **changed})
    return context


def steps_in(context: Context) -> int:
    """Steps that a real site's ledger counts on its dataset."""
    book = LedgerFile(str(context.node_config["ledger-path"])).read().book
    return sum(steps for _, _, steps in book.segments("default"))


def used_ledger(folder: Path) -> Path:
    """A ledger with a finished round, an open one of another run, and a round on another dataset."""
    made = new_ledger(folder)
    serve(made, 2.0, steps=4, taken=2)
    session(made, run="2").reserve(1.0, 0.1, 3)
    serve(made, 2.0, dataset="b")
    return made
