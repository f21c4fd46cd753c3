"""The file behind a site's ledger: SQLite, append-only, verified whenever it is opened. It knows no budget and no ε.

Every use opens the file, checks its schema, recomputes the hashes of the entries since the last checkpoint, and closes it
again: nothing is held between uses that a dying process could leave behind. SQLite's rollback journal makes each append all
or nothing. A reader holds SQLite's lock only while it copies rows; a writer while it compares the head, appends, and
updates witness and checkpoint. Verifying and composing happen without a lock.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from lalora_flwr.ground.errors import LedgerError
from lalora_flwr.ground.files import expanded, sync_folder
from lalora_flwr.ledger.book import Book
from lalora_flwr.ledger.content import Appended, Content
from lalora_flwr.ledger.database import (
    APPLICATION_ID,
    INSERT,
    SCHEMA,
    configure,
    hash_of,
    identity,
    newest,
    read_rows,
    reading,
    writing,
)
from lalora_flwr.ledger.entries import (
    FORMAT,
    NO_HASH,
    Entry,
    Genesis,
    clock,
    hash_after,
    read_chain,
    to_json,
    written,
)
from lalora_flwr.ledger.state import PUT_BACK, Mark, State, extended, load_checkpoint, read_state, store_checkpoint, was_rewritten
from lalora_flwr.ledger.witness import Sighting, Witness

BUSY_SECONDS = 30.0  # how long a use waits for other processes before it gives up
READ_AGAIN = 32  # a reader that had to verify more entries than this leaves a checkpoint; after an append there always is one


class LedgerFile:
    """A ledger on disk, with its cache folder ``<path>.cache`` and, if its owner names one, its witness."""

    def __init__(self, path: Path | str, busy_seconds: float | None = None, *, witness: Path | str = "") -> None:
        """Touches nothing yet.

        Args:
            path: the ledger.
            busy_seconds: patience with other processes that use the file; default `BUSY_SECONDS`.
            witness: the file that remembers the newest entry; none if empty.
        """
        self.path = expanded(path)
        self.cache = self.path.with_name(f"{self.path.name}.cache")
        self._busy_seconds = BUSY_SECONDS if busy_seconds is None else busy_seconds
        self._witness = Witness(witness) if str(witness) else None
        self._known: State | None = None  # what this object has verified

    def read(self, *, thorough: bool = False) -> Content:
        """All entries, every hash recomputed from the first on; ``thorough`` adds SQLite's own check of the whole file.

        Raises:
            LedgerError: if there is no such file, it is no ledger, was changed, is damaged, locked, or not what its witness saw.
        """
        seen = self._seen()
        with self._open() as connection:
            with reading(connection):
                rows = read_rows(connection)
                if thorough and (found := connection.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
                    raise LedgerError(found)
            entries, hashes = [], []
            for entry, digest in read_chain(rows):
                entries.append(entry)
                hashes.append(digest)
            if not entries:
                raise LedgerError("it holds no entry")
            content = Content(entries, hashes, Book(entries))
            witnessed = hashes[seen.entries - 1] if seen and seen.entries <= len(hashes) else ""
            self._compare(seen, witnessed, content.ledger, len(entries))
            return content

    def make_cache(self) -> None:
        """Make the cache folder, for its owner only, if that can be done; nothing depends on it."""
        with suppress(OSError):
            if self.path.is_file():
                self.cache.mkdir(mode=0o700)

    def state(self) -> State:
        """Where the ledger stands. Only entries that follow the last checkpoint are read, and its own newest entry.

        Guarantee: the sums are those of entries whose every hash was recomputed, here or when the checkpoint was made, and
        the ledger goes on from all that the checkpoint and the witness saw. Everything is read again if the file changed
        without an entry having been appended, or if its schema was touched: an edit of an old entry by other means than
        appending is noticed by the next use, unless it happened while a site was using the file, or when a process that
        had just appended an entry was killed before it wrote the checkpoint; `read` notices it always.

        Raises:
            LedgerError: as `read`.
        """
        seen = self._seen()  # before the ledger is read, which only grows
        with self._open() as connection:
            known, self._known = self._known or load_checkpoint(self.cache, self.path.stat().st_uid), None
            with reading(connection):
                mark = self._mark(connection)
                if known and known.ledger != identity(connection):
                    known = None
                first = known.last if known else 0
                rows = read_rows(connection, first)
                if known and was_rewritten(known.mark, mark, appended=len(rows) > 1):
                    first, rows = 0, read_rows(connection)
                witnessed = hash_of(connection, seen.entries - 1) if seen else ""
            if known and first:
                state = extended(known, rows, mark)
            else:
                state, hashes = read_state(rows, mark)
                if known and hashes[known.last : known.last + 1] != [known.head]:
                    raise LedgerError(f"entry {known.last} is not the one that was there before; {PUT_BACK}")
            self._compare(seen, witnessed, state.ledger, state.book.length)
        if len(rows) > READ_AGAIN:
            store_checkpoint(self.cache, state)
        self._known = state
        return state

    def check_writable(self) -> None:
        """Raises a `LedgerError` if the ledger or its witness cannot be written to now."""
        with self._open() as connection:
            if self._witness:
                self._witness.check_writable()
            with writing(connection):
                connection.execute("INSERT INTO entries SELECT coalesce(max(number) + 1, 0), '', '' FROM entries")  # undone

    def append(self, make: Callable[[Book], Entry], *, behind: tuple[int, str] | None = None) -> Appended:
        """Add the entry that ``make`` makes of the sums; when this returns it is on disk, and its witness knows it.

        Guarantee: the ledger holds the entry behind exactly the entries that ``make`` was shown, or not at all. ``make``
        runs without a lock, and again if another process was faster.

        Args:
            make: makes the entry; what it raises ends the attempt.
            behind: number and hash of an entry that must be in the ledger.

        Raises:
            LedgerError: if the ledger cannot be used, or other processes leave it no moment; the entry may then be there.
        """
        deadline = time.monotonic() + self._busy_seconds
        while True:
            state = self.state()
            entry = make(state.book)
            if self._append(state, entry, behind):
                return Appended(state.ledger, state.last, state.head)
            if time.monotonic() > deadline:
                raise LedgerError(f"{self.path}: locked: others appended to it for {self._busy_seconds:g} seconds")

    def _append(self, state: State, entry: Entry, behind: tuple[int, str] | None) -> bool:
        with self._open() as connection:
            if self._witness:
                self._witness.check_writable()  # before anything is counted
            with writing(connection):
                if behind and hash_of(connection, behind[0]) != behind[1]:
                    raise LedgerError("not the ledger in which the steps were reserved")
                if newest(connection) != (state.last, state.head) or self._mark(connection) != state.mark:
                    return False
                if self._witness:  # so that it is there, and one entry behind at most, if this process dies now
                    self._witness.write(state.ledger, state.book.length, state.head)
                self._known = None  # until the entry is known to be on disk
                number, body = state.book.add(entry), to_json(entry)
                state.previous, state.head = state.head, hash_after(state.head, body)
                connection.execute(INSERT, (number, body, state.head))
                connection.execute("COMMIT")
            with writing(connection):  # no other process can append, nor write witness or checkpoint
                if self._witness:
                    self._witness.write(state.ledger, state.book.length, state.head)
                if newest(connection) == (state.last, state.head):
                    state.mark = self._mark(connection)
                    store_checkpoint(self.cache, state)
        self._known = state
        return True

    def make_witness(self) -> Content:
        """Write the witness for the ledger as it is, which is the owner's to decide, and return the ledger.

        Raises:
            LedgerError: as `read`, and if a witness is there of which the ledger is no continuation.
        """
        if self._witness is None:
            raise ValueError("no witness was named")
        alone = LedgerFile(self.path, self._busy_seconds)
        content = (self if self._seen() else alone).read()
        with self._open() as connection:
            self._witness.check_writable()
            with writing(connection):
                self._witness.write(content.ledger, len(content.entries), content.head)
        return content

    def _seen(self) -> Sighting | None:
        try:
            return self._witness.read() if self._witness else None
        except LedgerError as error:
            raise LedgerError(f"{self.path}: {error}") from error

    def _compare(self, seen: Sighting | None, witnessed: str, ledger: str, entries: int) -> None:
        """Refuse a ledger that does not go on from what its witness saw; ``witnessed`` is its hash at that place."""
        if self._witness is None:
            return
        name = self._witness.path
        if seen is None:
            if entries > 1:
                raise LedgerError(
                    f"its witness {name} is missing; if you know why and the ledger is whole, make it with "
                    f"`lalora ledger witness {self.path} --witness {name}`"
                )
        elif seen.ledger != ledger:
            raise LedgerError(f"its witness {name} is that of another ledger, {seen.ledger}")
        elif seen.head != witnessed:
            raise LedgerError(f"its witness {name} saw {seen.entries} entries at {seen.time}, which are not there; {PUT_BACK}")

    def _mark(self, connection: sqlite3.Connection) -> Mark:
        stat = os.stat(self.path)  # never opened here: closing it would drop SQLite's locks
        schema = int(connection.execute("PRAGMA schema_version").fetchone()[0])
        return Mark(schema, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            if not self.path.is_file():
                raise LedgerError("no such file; `lalora ledger create` makes one")
            uri = f"{self.path.absolute().as_uri()}?mode=rw"  # never creates
            with closing(sqlite3.connect(uri, uri=True, timeout=self._busy_seconds, isolation_level=None)) as connection:
                configure(connection)
                yield connection
        except sqlite3.Error as error:
            raise LedgerError(f"{self.path}: {error}") from error
        except UnicodeDecodeError as error:  # of SQLite's own words about a damaged file, which quote it
            raise LedgerError(f"{self.path}: the database is damaged") from error
        except OSError as error:
            raise LedgerError(f"{self.path}: {error.strerror or error}") from error
        except LedgerError as error:
            raise LedgerError(f"{self.path}: {error}") from error.__cause__


def create(path: Path | str) -> str:
    """Make an empty ledger, readable by its owner only, and return its random id.

    Guarantee: a file that is there already is never touched; a crash leaves a whole ledger at ``path`` or none.

    Raises:
        LedgerError: if something is there already, or nothing can be written there.
    """
    path = expanded(path)
    first = Genesis(time=written(clock()), ledger=secrets.token_hex(16), format=FORMAT)
    body = to_json(first)
    try:
        with tempfile.TemporaryDirectory(prefix=".ledger-", dir=path.absolute().parent) as scratch:
            made = Path(scratch) / "ledger"
            made.touch(mode=0o600)
            with closing(sqlite3.connect(made, isolation_level=None)) as connection:
                configure(connection)
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                for statement in SCHEMA.values():
                    connection.execute(statement)
                connection.execute(INSERT, (0, body, hash_after(NO_HASH, body)))
                connection.execute("COMMIT")
            os.link(made, path)  # fails if there is something
        sync_folder(path.absolute().parent)
    except FileExistsError:
        raise LedgerError(f"{path}: there is a file already; a ledger is never overwritten") from None
    except (OSError, sqlite3.Error) as error:
        raise LedgerError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    return first.ledger
