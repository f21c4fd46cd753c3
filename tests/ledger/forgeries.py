"""A ledger's rows, and how to forge them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lalora_flwr.ledger.entries import (
    NO_HASH,
    Entry,
    Reserve,
    hash_after,
    to_json,
)
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.ledger.verify import verify
from tests.ledger.site_ledgers import compose, forge


def rehashed(path: Path, change: Callable[[list[Entry]], None]) -> None:
    """Change entries and recompute every hash: what somebody can do who owns the file and knows the format."""
    entries = LedgerFile(path).read().entries
    change(entries)
    statements: list[tuple[str, tuple[Any, ...]]] = [("DELETE FROM entries", ())]
    previous = NO_HASH
    for number, entry in enumerate(entries):
        body = to_json(entry)
        previous = hash_after(previous, body)
        statements.append(("INSERT INTO entries VALUES (?, ?, ?)", (number, body, previous)))
    forge(path, *statements)


def check(path: Path, head: str = "") -> None:
    verify(LedgerFile(path), head, compose)


Change = Callable[[list[Entry]], None]


def edited(number: int, values: Callable[[Reserve], dict[str, Any]]) -> Change:
    def change(entries: list[Entry]) -> None:
        entry = entries[number]
        assert isinstance(entry, Reserve)
        entries[number] = replace(entry, **values(entry))

    return change
