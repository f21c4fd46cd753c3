"""What a reader or a writer of a ledger gets."""

from __future__ import annotations

from dataclasses import dataclass

from lalora_flwr.ledger.book import Book
from lalora_flwr.ledger.entries import Entry, Genesis


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

    @property
    def ledger(self) -> str:
        """The ledger's random id."""
        first = self.entries[0]
        assert isinstance(first, Genesis)
        return first.ledger


@dataclass(frozen=True)
class Appended:
    """An entry that is on disk: its number and hash, and the id of the ledger."""

    ledger: str
    number: int
    hash: str
