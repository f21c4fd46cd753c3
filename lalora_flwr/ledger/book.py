"""What the entries of a ledger add up to, kept up to date entry by entry. No file, no ε.

A book forgets the entries themselves: what it holds grows with the number of datasets, runs, (σ, q) and open
reservations, not with the number of rounds, and `state` is small enough to be kept beside the ledger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from datetime import datetime
from typing import Any

from lalora_flwr.ground.errors import LedgerError
from lalora_flwr.ledger.entries import EVALUATE, Commit, Entry, Reserve, SharedReserve
from lalora_flwr.ledger.sharing import counted
from lalora_flwr.privacy.events import SampledGaussian

Steps = Counter[tuple[float, float]]  # (σ, q) -> steps
Rows = list[list[Any]]  # [σ, q, steps], as JSON holds them: of many runs only a few are ever looked at
KEPT_HOURS = 2000  # a dataset's hours with a reservation, newest entries first: 83 days if every hour has one
HOUR = 3600


@dataclass
class Records:
    """Which records a dataset was last, by its entries.

    Attributes:
        fingerprint: what identifies them.
        since, until: times of the first and the newest of the last reservations in a row with this fingerprint.
    """

    fingerprint: str
    since: str
    until: str


@dataclass
class _Dataset:
    totals: Steps = field(default_factory=Counter)
    alone: Steps = field(default_factory=Counter)  # the same steps, by the site's own part of a noise that it shared
    records: Records | None = None
    hours: dict[int, int] = field(default_factory=dict)  # hours since 1970 -> reservations, in the order of the entries
    rounds: int = 0  # reservations for training
    evaluations: int = 0  # and for answers about a run's adapter


@dataclass
class _Open:
    """A reservation without a commit; ``run`` is None if it does not count into a run's own steps.

    ``own`` is the noise multiplier of the site's own part of a noise that it shares, elsewhere ``sigma``.
    """

    dataset: str
    run: str | None
    sigma: float
    q: float
    steps: int
    own: float


class Book:
    """Sums over a ledger's entries.

    Guarantee: `segments` holds every step that was ever reserved and not given back by its own commit; a reservation
    without a commit, because its process died or is still at it, counts in full.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.length = 0  # entries counted
        self._datasets: dict[str, _Dataset] = {}
        self._runs: dict[str, dict[str, Rows]] = {}  # dataset -> run -> steps
        self._names: dict[str, str] = {}  # fingerprint -> dataset
        self._open: dict[int, _Open] = {}
        self._attempts: dict[str, tuple[int, int]] = {}  # public key and run -> newest (round, attempt) of a secure sum
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> int:
        """Count the next entry and return its number.

        Raises:
            LedgerError: if no site writes such an entry at this place; nothing is counted then.
        """
        number = self.length
        if isinstance(entry, Reserve):
            self._reserve(number, entry)
        elif isinstance(entry, Commit):
            self._commit(number, entry)
        self.length += 1
        return number

    def _reserve(self, number: int, entry: Reserve) -> None:
        if not entry.event.noisy:
            raise LedgerError(f"entry {number}: reserves what are no noisy steps")
        if self.dataset_of(entry.fingerprint) not in (None, entry.dataset):
            raise LedgerError(f"entry {number}: its records are in the ledger under another name")
        if self.segments(entry.dataset, plus=entry.event) != entry.segments:
            raise LedgerError(f"entry {number}: its segments are not the sum of the entries before it")
        own = self._check_shared(number, entry) if isinstance(entry, SharedReserve) else entry.sigma
        try:
            hour = int(datetime.fromisoformat(entry.time).timestamp()) // HOUR
        except (ValueError, OverflowError):
            raise LedgerError(f"entry {number}: its time is not a time") from None
        run = None if entry.schedule == EVALUATE else entry.run
        if run is not None:
            _add(self._runs.setdefault(entry.dataset, {}).setdefault(run, []), entry.sigma, entry.q, entry.steps)
        self._names[entry.fingerprint] = entry.dataset
        dataset = self._datasets.setdefault(entry.dataset, _Dataset())
        dataset.totals[entry.sigma, entry.q] += entry.steps
        dataset.alone[own, entry.q] += entry.steps
        if run is None:
            dataset.evaluations += 1
        else:
            dataset.rounds += 1
        dataset.hours[hour] = dataset.hours.pop(hour, 0) + 1
        if len(dataset.hours) > KEPT_HOURS:
            del dataset.hours[next(iter(dataset.hours))]
        if dataset.records is None or dataset.records.fingerprint != entry.fingerprint:
            dataset.records = Records(entry.fingerprint, entry.time, entry.time)
        dataset.records.until = entry.time
        self._open[number] = _Open(entry.dataset, run, entry.sigma, entry.q, entry.steps, own)
        if isinstance(entry, SharedReserve):
            self._attempts[f"{entry.key} {entry.run}"] = entry.round, entry.attempt

    def _check_shared(self, number: int, entry: SharedReserve) -> float:
        if not self.is_new(entry.key, entry.run, entry.round, entry.attempt):
            raise LedgerError(f"entry {number}: repeats an attempt of a secure sum")
        if not 0 <= entry.colluders < entry.sites or not entry.share**2 * (entry.sites - entry.colluders) >= entry.sigma**2:
            raise LedgerError(f"entry {number}: its shares do not make the noise that it counts with")
        own = counted(entry.share)
        if self.alone(entry.dataset, plus=entry.event._replace(noise_multiplier=own)) != entry.alone:
            raise LedgerError(f"entry {number}: its segments without the others' noise are not the sum of the entries before it")
        return own

    def is_new(self, key: str, run: str, server_round: int, attempt: int) -> bool:
        """Whether an attempt of a secure sum comes after all of its run that were answered with this key."""
        return (server_round, attempt) > self._attempts.get(f"{key} {run}", (0, 0))

    def _commit(self, number: int, entry: Commit) -> None:
        reservation = self._open.get(entry.reserve)
        if reservation is None:
            raise LedgerError(f"entry {number}: commits what is not reserved")
        if not 0 <= entry.taken <= reservation.steps:
            raise LedgerError(f"entry {number}: commits more steps than were reserved")
        del self._open[entry.reserve]
        sigma, q, given_back = reservation.sigma, reservation.q, reservation.steps - entry.taken
        self._datasets[reservation.dataset].totals[sigma, q] -= given_back
        self._datasets[reservation.dataset].alone[reservation.own, q] -= given_back
        if reservation.run is not None:
            _add(self._runs[reservation.dataset][reservation.run], sigma, q, -given_back)

    @property
    def datasets(self) -> list[str]:
        """Names of all datasets, sorted."""
        return sorted(self._datasets)

    def dataset_of(self, fingerprint: str) -> str | None:
        """The name under which these records are in the ledger."""
        return self._names.get(fingerprint)

    def records_of(self, dataset: str) -> Records | None:
        """Which records the dataset was when steps on it were last reserved."""
        return self._datasets[dataset].records if dataset in self._datasets else None

    def served(self, dataset: str) -> tuple[int, int]:
        """How many rounds and evaluations were ever reserved on a dataset, those that came to nothing included."""
        found = self._datasets.get(dataset, _Dataset())
        return found.rounds, found.evaluations

    def segments(self, dataset: str, *, plus: SampledGaussian | None = None) -> tuple[SampledGaussian, ...]:
        """All steps on a dataset as sorted (σ, q, steps), one for each (σ, q); with more steps added if given."""
        return _sum(self._datasets[dataset].totals if dataset in self._datasets else Counter(), plus)

    def alone(self, dataset: str, *, plus: SampledGaussian | None = None) -> tuple[SampledGaussian, ...]:
        """As `segments`, with the site's own part only of each noise that it shared."""
        return _sum(self._datasets[dataset].alone if dataset in self._datasets else Counter(), plus)

    def run_segments(self, dataset: str, run: str) -> tuple[SampledGaussian, ...]:
        """The same for the steps that one run took in training; evaluations are not among them."""
        return _sorted(_counted(self._runs.get(dataset, {}).get(run, [])))

    def recent(self, dataset: str, now: datetime) -> int:
        """Reservations on a dataset in the last 24 hours, and up to an hour more, since it counts by hours.

        Guarantee: an entry of a later time than ``now`` counts, so setting the clock back uncovers nothing.
        """
        first = int(now.timestamp()) // HOUR - 24
        hours = self._datasets[dataset].hours if dataset in self._datasets else {}
        return sum(count for hour, count in hours.items() if hour >= first)

    def state(self) -> dict[str, Any]:
        """All of it as JSON holds it; it shares parts with the book."""
        return {
            "length": self.length,
            "datasets": {
                name: [
                    _sorted(d.totals),
                    _sorted(d.alone),
                    astuple(d.records) if d.records else None,
                    list(d.hours.items()),
                    [d.rounds, d.evaluations],
                ]
                for name, d in self._datasets.items()
            },
            "runs": self._runs,
            "names": self._names,
            "attempts": {run: list(newest) for run, newest in self._attempts.items()},
            "open": [[number, *astuple(reservation)] for number, reservation in self._open.items()],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Book:
        """The book that wrote ``state``.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: if none did.
        """
        book = cls()
        book.length = int(state["length"])
        for name, (totals, alone, records, hours, (rounds, evaluations)) in state["datasets"].items():
            last = Records(*records) if records else None
            sums = _counted(totals), _counted(alone), last, dict(map(tuple, hours))
            book._datasets[name] = _Dataset(*sums, int(rounds), int(evaluations))
        book._runs, book._names = dict(state["runs"]), dict(state["names"])
        book._attempts = {run: (newest[0], newest[1]) for run, newest in state["attempts"].items()}
        book._open = {number: _Open(*values) for number, *values in state["open"]}
        return book


def _add(rows: Rows, sigma: float, q: float, steps: int) -> None:
    for row in rows:
        if row[:2] == [sigma, q]:
            row[2] += steps
            return
    rows.append([sigma, q, steps])


def _sum(steps: Steps, plus: SampledGaussian | None) -> tuple[SampledGaussian, ...]:
    total = steps.copy()
    if plus:
        total[plus[:2]] += plus.steps
    return _sorted(total)


def _sorted(total: Steps) -> tuple[SampledGaussian, ...]:
    return tuple(SampledGaussian(sigma, q, steps) for (sigma, q), steps in sorted(total.items()) if steps)


def _counted(segments: Iterable[Sequence[Any]]) -> Steps:
    return Counter({(sigma, q): steps for sigma, q, steps in segments})
