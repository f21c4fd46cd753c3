"""Checkpoints of a ledger as tests look at them."""

from __future__ import annotations

import json
from pathlib import Path

from lalora_flwr.ledger.book import Book
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.ledger.state import NAME, State, load_checkpoint


def checkpoint(path: Path) -> Path:
    return LedgerFile(path).cache / NAME


def loaded(path: Path) -> State:
    state = load_checkpoint(LedgerFile(path).cache, path.stat().st_uid)
    assert state is not None
    return state


def sums(book: Book) -> dict[str, object]:
    """All of a book, without the order in which it counted."""
    state = json.loads(json.dumps(book.state()))
    for runs in state["runs"].values():
        for rows in runs.values():
            rows.sort()
    return state


def all_entries(path: Path) -> dict[str, object]:
    return sums(LedgerFile(path).read().book)
