"""The file behind a site's ledger: SQLite, append-only, verified whenever it is opened. It knows no budget and no ε.

Every use opens the file, checks its schema, recomputes every hash, and closes it again: nothing is held between uses
that a dying process could leave behind. SQLite's rollback journal makes each append all or nothing.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lalora_flwr.errors import LedgerError
from lalora_flwr.privacy.ledger_book import Book
from lalora_flwr.privacy.ledger_entries import FORMAT, NO_HASH, Entry, Genesis, hash_after, now, read_chain, to_json

BUSY_SECONDS = 30.0  # how long a use waits for another process before it gives up
APPLICATION_ID = 0x4C41_4C4F  # "LALO", in the file's header
SCHEMA = {
    "entries": "CREATE TABLE entries (number INTEGER PRIMARY KEY, body TEXT NOT NULL, hash TEXT NOT NULL)",
    "in_order": "CREATE TRIGGER in_order BEFORE INSERT ON entries"
    " WHEN NEW.number IS NOT (SELECT coalesce(max(number) + 1, 0) FROM entries)"
    " BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "no_update": "CREATE TRIGGER no_update BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "no_delete": "CREATE TRIGGER no_delete BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
}
_INSERT = "INSERT INTO entries (number, body, hash) VALUES (?, ?, ?)"


@dataclass
class Content:
    """All of a ledger at one moment: entries, their hashes, and what they add up to."""

    entries: list[Entry]
    hashes: list[str]
    book: Book

    @property
    def head(self) -> str:
        """The newest hash: whoever notes it can later prove that nothing up to here was taken away."""
        return self.hashes[-1]


class Writer:
    """A ledger while its write lock is held: nobody else can append."""

    def __init__(self, connection: sqlite3.Connection, content: Content) -> None:
        self._connection, self._content = connection, content
        self.book = content.book

    def hash_of(self, number: int) -> str:
        """The hash of an entry; empty if there is none of that number."""
        return self._content.hashes[number] if number < len(self._content.hashes) else ""

    def append(self, entry: Entry) -> int:
        """Add an entry and return its number; it is durable once the transaction has ended.

        Raises:
            LedgerError: if the entry does not fit behind those before it.
        """
        number, body = self.book.add(entry), to_json(entry)
        digest = hash_after(self._content.head, body)
        self._connection.execute(_INSERT, (number, body, digest))
        self._content.entries.append(entry)
        self._content.hashes.append(digest)
        return number


class LedgerFile:
    """A ledger on disk."""

    def __init__(self, path: Path | str, busy_seconds: float | None = None) -> None:
        """``busy_seconds``: patience with another process that holds the file; default `BUSY_SECONDS`."""
        self.path = Path(path).expanduser()
        self._busy_seconds = BUSY_SECONDS if busy_seconds is None else busy_seconds

    def read(self, *, thorough: bool = False) -> Content:
        """All entries, after the checks that every use makes; ``thorough`` adds SQLite's own check of the whole file.

        Raises:
            LedgerError: if there is no such file, it is no ledger, was changed, is damaged or locked.
        """
        with self._open() as connection:
            connection.execute("BEGIN")
            content = _read(connection)
            if thorough and (found := connection.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
                raise LedgerError(found)
            return content

    @contextmanager
    def transaction(self, *, dry: bool = False) -> Iterator[Writer]:
        """The ledger with its write lock held. What was appended is on disk when the block has ended without an error.

        Guarantee: all that the block appended, or nothing. No other process appends between what the block read and what
        it wrote. With ``dry`` nothing is kept, but a file that cannot be written to is noticed.

        Raises:
            LedgerError: if the ledger cannot be used, or what was appended may not be durable.
        """
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield Writer(connection, _read(connection))
                connection.execute("ROLLBACK" if dry else "COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            if not self.path.is_file():
                raise LedgerError("no such file; `lalora ledger create` makes one")
            uri = f"{self.path.absolute().as_uri()}?mode=rw"  # never creates
            with closing(sqlite3.connect(uri, uri=True, timeout=self._busy_seconds, isolation_level=None)) as connection:
                _configure(connection)
                yield connection
        except sqlite3.Error as error:
            raise LedgerError(f"{self.path}: {error}") from error
        except OSError as error:
            raise LedgerError(f"{self.path}: {error.strerror or error}") from error
        except LedgerError as error:
            if str(error).startswith(f"{self.path}: "):
                raise
            raise LedgerError(f"{self.path}: {error}") from error.__cause__


def create(path: Path | str) -> str:
    """Make an empty ledger, readable by its owner only, and return its random id.

    Guarantee: a file that is there already is never touched; a crash leaves a whole ledger at ``path`` or none.

    Raises:
        LedgerError: if something is there already, or nothing can be written there.
    """
    path = Path(path).expanduser()
    first = Genesis(time=now(), ledger=secrets.token_hex(16), format=FORMAT)
    body = to_json(first)
    try:
        with tempfile.TemporaryDirectory(prefix=".ledger-", dir=path.absolute().parent) as scratch:
            made = Path(scratch) / "ledger"
            made.touch(mode=0o600)
            with closing(sqlite3.connect(made, isolation_level=None)) as connection:
                _configure(connection)
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                for statement in SCHEMA.values():
                    connection.execute(statement)
                connection.execute(_INSERT, (0, body, hash_after(NO_HASH, body)))
                connection.execute("COMMIT")
            os.link(made, path)  # fails if there is something
        _sync_folder(path.absolute().parent)
    except FileExistsError:
        raise LedgerError(f"{path}: there is a file already; a ledger is never overwritten") from None
    except (OSError, sqlite3.Error) as error:
        raise LedgerError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    return first.ledger


def _configure(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA synchronous = EXTRA")  # an append is on disk, its folder included, when COMMIT returns
    if connection.execute("PRAGMA journal_mode = DELETE").fetchone()[0] != "delete":
        raise LedgerError("not in the journal mode of a ledger")


def _read(connection: sqlite3.Connection) -> Content:
    """All entries, schema and chain checked, inside of the caller's transaction."""
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise LedgerError("not a ledger")
    if dict(connection.execute("SELECT name, sql FROM sqlite_master")) != SCHEMA:
        raise LedgerError("its schema was changed")
    rows = connection.execute("SELECT number, body, hash FROM entries ORDER BY number").fetchall()  # an open cursor is a lock
    entries, hashes = read_chain(rows)
    return Content(entries, hashes, Book(entries))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
