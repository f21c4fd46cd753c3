"""A second place that remembers a ledger's newest entry, so that a ledger put back to an older copy is refused.

The file is one line of JSON: the ledger's id, the number of its entries, the newest hash, and the site's time. It is written
after every append, before a step of that reservation is taken. A crash in between leaves it behind the ledger by
what was just appended, which is fine: the ledger has gone on from there. A ledger behind its witness was put back.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from lalora_flwr.ground.errors import LedgerError
from lalora_flwr.ground.files import expanded, replace_file
from lalora_flwr.ledger.entries import clock, written


@dataclass(frozen=True)
class Sighting:
    """A ledger as its witness saw it last: its id, how many entries it had, the newest hash, and when that was."""

    ledger: str
    entries: int
    head: str
    time: str


class Witness:
    """The file in which one ledger's newest entry is remembered."""

    def __init__(self, path: Path | str) -> None:
        self.path = expanded(path)

    def read(self) -> Sighting | None:
        """What it remembers; None if there is no file.

        Raises:
            LedgerError: if it cannot be read or is no witness.
        """
        try:
            text = self.path.read_text(encoding="ascii")
            values = json.loads(text)
            sighting = Sighting(**values)
            if [type(value) for value in values.values()] != [str, int, str, str] or _text(sighting) != text:
                raise ValueError
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LedgerError(f"its witness {self.path} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, AttributeError):
            raise LedgerError(f"its witness {self.path} is damaged or no witness") from None
        return sighting

    def check_writable(self) -> None:
        """Raises a `LedgerError` if the file's folder is not there or may not be written to."""
        if not os.access(self.path.absolute().parent, os.W_OK | os.X_OK):
            raise LedgerError(f"its witness {self.path} cannot be written: no such folder, or no permission")

    def write(self, ledger: str, entries: int, head: str) -> None:
        """Remember a ledger's newest entry; it is on disk when this returns. The caller holds the ledger's write lock.

        Guarantee: what a witness remembers of a ledger never gets older, and a witness of another ledger stays what it is.

        Raises:
            LedgerError: if it is another ledger's witness or cannot be written.
        """
        seen = self.read()
        if seen is not None and seen.ledger != ledger:
            raise LedgerError(f"its witness {self.path} is that of another ledger, {seen.ledger}")
        if seen is not None and seen.entries >= entries:
            return
        try:
            replace_file(self.path, _text(Sighting(ledger, entries, head, written(clock()))), durable=True)
        except OSError as error:
            raise LedgerError(f"its witness {self.path} cannot be written: {error.strerror}") from error


def _text(sighting: Sighting) -> str:
    return json.dumps(asdict(sighting)) + "\n"
