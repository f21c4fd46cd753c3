"""The SQLite database inside of a ledger's file: its schema, its transactions, and the few queries on it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lalora_flwr.ground.errors import LedgerError
from lalora_flwr.ledger.entries import Genesis, from_json
from lalora_flwr.ledger.state import Row

APPLICATION_ID = 0x4C41_4C4F  # "LALO", in the file's header
SCHEMA = {
    "entries": "CREATE TABLE entries (number INTEGER PRIMARY KEY, body TEXT NOT NULL, hash TEXT NOT NULL)",
    "in_order": "CREATE TRIGGER in_order BEFORE INSERT ON entries"
    " WHEN NEW.number IS NOT (SELECT coalesce(max(number) + 1, 0) FROM entries)"
    " BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "no_update": "CREATE TRIGGER no_update BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "no_delete": "CREATE TRIGGER no_delete BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
}
INSERT = "INSERT INTO entries (number, body, hash) VALUES (?, ?, ?)"


def configure(connection: sqlite3.Connection) -> None:
    """Make every commit durable.

    Raises:
        LedgerError: the file is not kept as a ledger's is.
    """
    connection.execute("PRAGMA synchronous = EXTRA")  # an append is on disk, its folder included, when COMMIT returns
    if connection.execute("PRAGMA journal_mode = DELETE").fetchone()[0] != "delete":
        raise LedgerError("not in the journal mode of a ledger")


@contextmanager
def reading(connection: sqlite3.Connection) -> Iterator[None]:
    """One view of a ledger of the right form. No other process can append meanwhile, so verifying has to wait until after."""
    with _transaction(connection, "BEGIN"):
        _check_form(connection)
        yield


@contextmanager
def writing(connection: sqlite3.Connection) -> Iterator[None]:
    """The write lock of a ledger of the right form; what the block did not commit is undone."""
    with _transaction(connection, "BEGIN IMMEDIATE"):
        _check_form(connection)
        yield


@contextmanager
def _transaction(connection: sqlite3.Connection, begin: str) -> Iterator[None]:
    connection.execute(begin)
    try:
        yield
    finally:
        if connection.in_transaction:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")


def _check_form(connection: sqlite3.Connection) -> None:
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise LedgerError("not a ledger")
    if dict(connection.execute("SELECT name, sql FROM sqlite_master")) != SCHEMA:
        raise LedgerError("its schema was changed")


def read_rows(connection: sqlite3.Connection, first: int = 0) -> list[Row]:
    """All entries from a number on."""
    query = "SELECT number, body, hash FROM entries WHERE number >= ? ORDER BY number"
    return connection.execute(query, (first,)).fetchall()  # an open cursor is a lock


def newest(connection: sqlite3.Connection) -> tuple[object, object] | None:
    """Number and hash of the last entry."""
    query = "SELECT number, hash FROM entries ORDER BY number DESC LIMIT 1"
    found: tuple[object, object] | None = connection.execute(query).fetchone()
    return found


def hash_of(connection: sqlite3.Connection, number: int) -> str:
    """The hash of an entry; empty if there is none of that number."""
    found = connection.execute("SELECT hash FROM entries WHERE number = ?", (number,)).fetchone()
    return str(found[0]) if found else ""


def identity(connection: sqlite3.Connection) -> str:
    """The ledger's random id, as its first entry says it; empty if it does not."""
    found = connection.execute("SELECT body FROM entries WHERE number = 0").fetchone()
    with suppress(LedgerError):
        if found and isinstance(first := from_json(found[0]), Genesis):
            return first.ledger
    return ""
