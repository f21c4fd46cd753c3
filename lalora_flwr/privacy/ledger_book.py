"""What the entries of a ledger add up to: steps counted by dataset and by run. No file, no ε."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lalora_flwr.errors import LedgerError
from lalora_flwr.privacy.accounting import Segment
from lalora_flwr.privacy.ledger_entries import Commit, Entry, Reserve, is_step


@dataclass
class Reservation:
    """A reserve entry and how many of its steps count: all of them until a commit gives some back."""

    entry: Reserve
    counted: int
    committed: bool = False


class Book:
    """Reservations by entry number.

    Guarantee: `segments` holds every step that was ever reserved and not given back by its own commit; a reservation
    without a commit, because its process died or is still at it, counts in full.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.reservations: dict[int, Reservation] = {}
        self._length = 0
        self._names: dict[str, str] = {}  # fingerprint -> dataset
        self._totals: dict[str, Counter[tuple[float, float]]] = {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> int:
        """Count the next entry and return its number.

        Raises:
            LedgerError: if no site writes such an entry at this place.
        """
        number = self._length
        if isinstance(entry, Reserve):
            self._reserve(number, entry)
        elif isinstance(entry, Commit):
            self._commit(number, entry)
        self._length += 1
        return number

    def _reserve(self, number: int, entry: Reserve) -> None:
        if not is_step(entry.sigma, entry.q, entry.steps):
            raise LedgerError(f"entry {number}: reserves what are no noisy steps")
        if self.dataset_of(entry.fingerprint) not in (None, entry.dataset):
            raise LedgerError(f"entry {number}: its records are in the ledger under another name")
        if self.segments(entry.dataset, plus=(entry.sigma, entry.q, entry.steps)) != entry.segments:
            raise LedgerError(f"entry {number}: its segments are not the sum of the entries before it")
        self._names[entry.fingerprint] = entry.dataset
        self._totals.setdefault(entry.dataset, Counter())[entry.sigma, entry.q] += entry.steps
        self.reservations[number] = Reservation(entry, entry.steps)

    def _commit(self, number: int, entry: Commit) -> None:
        reservation = self.reservations.get(entry.reserve)
        if reservation is None or reservation.committed:
            raise LedgerError(f"entry {number}: commits what is not reserved")
        if not 0 <= entry.taken <= reservation.counted:
            raise LedgerError(f"entry {number}: commits more steps than were reserved")
        reserved = reservation.entry
        self._totals[reserved.dataset][reserved.sigma, reserved.q] -= reservation.counted - entry.taken
        reservation.counted, reservation.committed = entry.taken, True

    @property
    def datasets(self) -> list[str]:
        """Names of all datasets, sorted."""
        return sorted(self._totals)

    def dataset_of(self, fingerprint: str) -> str | None:
        """The name under which these records are in the ledger."""
        return self._names.get(fingerprint)

    def segments(self, dataset: str, *, plus: Segment | None = None) -> tuple[Segment, ...]:
        """All steps on a dataset as sorted (σ, q, steps), one for each (σ, q); with more steps added if given."""
        total = self._totals.get(dataset, Counter()).copy()
        if plus:
            total[plus[0], plus[1]] += plus[2]
        return _sorted(total)

    def run_segments(self, dataset: str, run: str) -> tuple[Segment, ...]:
        """The same for the steps that one run took."""
        total: Counter[tuple[float, float]] = Counter()
        for r in self.reservations.values():
            if (r.entry.dataset, r.entry.run) == (dataset, run):
                total[r.entry.sigma, r.entry.q] += r.counted
        return _sorted(total)


def _sorted(total: Counter[tuple[float, float]]) -> tuple[Segment, ...]:
    return tuple((sigma, q, steps) for (sigma, q), steps in sorted(total.items()) if steps)
