"""Where a ledger stands: what its verified entries add up to, and the checkpoint that saves reading them all again.

A checkpoint is a file in the ledger's cache folder: the SHA-256 of its JSON, a newline, the JSON. One that is damaged, of
another ledger or of another version is not used, which costs one reading of the whole ledger and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lalora_flwr.ground.errors import LedgerError
from lalora_flwr.ground.files import replace_file
from lalora_flwr.ledger.book import Book
from lalora_flwr.ledger.entries import NO_HASH, Genesis, hash_after, read_chain

log = logging.getLogger("lalora_flwr.site")
VERSION = 4
NAME = "checkpoint"
PUT_BACK = "the file was changed or put back to an older copy"
Row = tuple[Any, Any, Any]  # number, body, hash


@dataclass(frozen=True)
class Mark:
    """What SQLite and the file system say of the ledger's file; it changes with every write to it.

    Attributes:
        schema: SQLite's count of changes to the schema. Entries cannot be edited or deleted by SQLite without one.
        inode, size, modified, changed: of the file; times in nanoseconds.
    """

    schema: int
    inode: int
    size: int
    modified: int
    changed: int


@dataclass
class State:
    """A ledger whose every hash was recomputed, now or when its checkpoint was made.

    Attributes:
        ledger: its random id.
        book: the sums of its entries.
        head, previous: the hashes of the newest entry and of the one before it.
        mark: the file when the newest entry was read.
    """

    ledger: str
    book: Book
    head: str
    previous: str
    mark: Mark

    @property
    def last(self) -> int:
        """Number of the newest entry."""
        return self.book.length - 1

    def extend(self, rows: Iterable[Row]) -> None:
        """Verify and add the entries that follow.

        Raises:
            LedgerError: naming the first that does not fit; the state is then of no more use.
        """
        for entry, digest in read_chain(rows, self.book.length, self.head):
            self.book.add(entry)
            self.previous, self.head = self.head, digest

    def holds(self, row: Row) -> bool:
        """Whether a row is the newest entry, its hash recomputed."""
        number, body, digest = row
        return (number, digest) == (self.last, self.head) and isinstance(body, str) and hash_after(self.previous, body) == digest


def read_state(rows: Iterable[Row], mark: Mark) -> tuple[State, list[str]]:
    """The state after all rows of a ledger, and the hash of each.

    Raises:
        LedgerError: naming the first entry that does not fit.
    """
    state, hashes = State("", Book(), NO_HASH, NO_HASH, mark), []
    for entry, digest in read_chain(rows):
        if isinstance(entry, Genesis):
            state.ledger = entry.ledger
        state.book.add(entry)
        state.previous, state.head = state.head, digest
        hashes.append(digest)
    if not hashes:
        raise LedgerError("it holds no entry")
    return state, hashes


def was_rewritten(before: Mark, mark: Mark, *, appended: bool) -> bool:
    """Whether something else than appending entries may have happened to the file."""
    if mark == before:
        return False
    return not appended or (mark.schema, mark.inode) != (before.schema, before.inode) or mark.size < before.size


def extended(known: State, rows: list[Row], mark: Mark) -> State:
    """The state after the entries that follow it; the first row is its own newest."""
    if not rows or not known.holds(rows[0]):
        raise LedgerError(f"entry {known.last} is not the one that was there before; {PUT_BACK}")
    known.extend(rows[1:])
    known.mark = mark
    return known


def load_checkpoint(folder: Path, owner: int) -> State | None:
    """The state that `store_checkpoint` wrote; None if there is none that can be trusted.

    Guarantee: a file with a damaged byte is not used, nor one in a folder that anybody but ``owner`` (a user id, that of
    the ledger's file) may write to. Whoever may write there can forge one; `verify` finds what follows from it.
    """
    try:
        of_folder = folder.stat()
        if of_folder.st_uid != owner or of_folder.st_mode & 0o022:
            log.warning("%s: not used, since it must belong to the ledger's owner and be writable to nobody else", folder)
            return None
        digest, _, body = (folder / NAME).read_text(encoding="ascii").partition("\n")
        if digest != hashlib.sha256(body.encode()).hexdigest():
            raise ValueError("its hash does not fit")
        values = json.loads(body)
        if values["version"] != VERSION:
            return None
        names = ("ledger", "head", "previous")
        state = State(book=Book.from_state(values["book"]), mark=Mark(*values["mark"]), **{name: values[name] for name in names})
        return state if state.book.length else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s: a damaged checkpoint is not used: %s", folder / NAME, error)
        return None


def store_checkpoint(folder: Path, state: State) -> None:
    """Keep a state for the next process; a folder that cannot be written to costs time, nothing else."""
    mark = state.mark
    values = {
        "version": VERSION,
        "ledger": state.ledger,
        "head": state.head,
        "previous": state.previous,
        "mark": [mark.schema, mark.inode, mark.size, mark.modified, mark.changed],
        "book": state.book.state(),
    }
    body = json.dumps(values, separators=(",", ":"), allow_nan=False)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        replace_file(folder / NAME, f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}", durable=False)
    except OSError as error:
        log.warning("%s: no checkpoint could be written, so the next use reads the whole ledger: %s", folder, error.strerror)
