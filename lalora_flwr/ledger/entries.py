"""The entries of a site's ledger: what each holds, its one written form, and the hash that binds it to all before it.

    hash 0 = SHA-256(64 zeros, newline, entry 0)      hash i = SHA-256(hash i-1, newline, entry i)

An entry is written as canonical JSON: keys sorted, no spaces, ASCII, floats in their shortest exact form.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, NoReturn

from lalora_flwr.ground.errors import LedgerError
from lalora_flwr.ledger.sharing import Sharing
from lalora_flwr.privacy.events import SampledGaussian, Target

FORMAT = 1
NO_HASH = "0" * 64
EVALUATE = "evaluate"  # the schedule of a reservation that is no training: a noised answer about the run's adapter


@dataclass(frozen=True)
class Genesis:
    """The first entry. ``ledger`` is random, so that no two ledgers share a hash."""

    time: str
    ledger: str
    format: int


@dataclass(frozen=True)
class Reserve:
    """Steps that count from now on, written before the first of them is taken.

    Attributes:
        time: UTC, by the site's clock.
        run, strategy, round, schedule: who asked for what; ``run`` is Flower's run id. With the schedule `EVALUATE` the
            step counts into the dataset's ε and not into the run's steps.
        dataset, fingerprint: the owner's name for the records, and what identifies them.
        sigma, q, clip_norm, steps: the mechanism: noise multiplier, sample rate, clip bound, number of steps.
        run_epsilon, run_delta, run_steps, run_accountant: what the run calibrated its noise for.
        max_epsilon: the owner's cap at the time.
        accountant, delta, epsilon: ε at δ of all steps on the dataset, these included.
        segments: the accountant's state behind ``epsilon``: (σ, q, steps), one for each (σ, q), sorted.
    """

    time: str
    run: str
    strategy: str
    round: int
    schedule: str
    dataset: str
    fingerprint: str
    sigma: float
    q: float
    clip_norm: float
    steps: int
    run_epsilon: float
    run_delta: float
    run_steps: int
    run_accountant: str
    max_epsilon: float
    accountant: str
    delta: float
    epsilon: float
    segments: tuple[SampledGaussian, ...]

    @property
    def event(self) -> SampledGaussian:
        """What the entry reserves."""
        return SampledGaussian(self.sigma, self.q, self.steps)

    @property
    def target(self) -> Target:
        """What the run calibrated its noise for."""
        return Target(self.run_epsilon, self.run_delta, self.run_steps, self.run_accountant)


@dataclass(frozen=True)
class SharedReserve(Reserve, Sharing):
    """A step whose noise several sites share: only their sum has it, and a site's own part of it is less.

    ``sigma``, ``epsilon`` and ``segments`` hold if at most ``colluders`` of the other sites side with the server.

    Attributes:
        alone_epsilon, alone: as ``epsilon`` and ``segments``, if all other sites side with the server.
    """

    alone_epsilon: float
    alone: tuple[SampledGaussian, ...]


@dataclass(frozen=True)
class Commit:
    """The steps of a reservation that were really taken; the others are given back."""

    time: str
    reserve: int  # number of its entry
    taken: int


Entry = Genesis | Reserve | Commit
KINDS: dict[str, type[Entry]] = {"genesis": Genesis, "reserve": Reserve, "shared": SharedReserve, "commit": Commit}
_TYPES: dict[str, type] = {"str": str, "int": int, "float": float}


def clock() -> datetime:
    """The site's clock, UTC."""
    return datetime.now(UTC)


def written(time: datetime) -> str:
    """A time as entries hold it: to the second."""
    return time.isoformat(timespec="seconds")


def to_dict(entry: Entry) -> dict[str, Any]:
    """An entry as JSON holds it."""
    kind = next(name for name, cls in KINDS.items() if cls is type(entry))
    return {"kind": kind, **asdict(entry)}


def to_json(entry: Entry) -> str:
    """The one written form of an entry."""
    return json.dumps(to_dict(entry), sort_keys=True, separators=(",", ":"), allow_nan=False)


def from_json(body: str) -> Entry:
    """The entry of a written form.

    Raises:
        LedgerError: if it is not the canonical form of an entry.
    """
    try:
        values = json.loads(body, parse_constant=_refuse)
        cls = KINDS[values.pop("kind")]
        if set(values) != {f.name for f in fields(cls)}:
            raise ValueError("its keys are not those of its kind")
        for f in fields(cls):
            if f.name in ("segments", "alone"):
                values[f.name] = tuple(_event(item) for item in values[f.name])
            elif type(values[f.name]) is not _TYPES[str(f.type)]:
                raise TypeError(f"{f.name} has the wrong type")
        entry = cls(**values)
        canonical = to_json(entry)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LedgerError(f"not an entry of a ledger: {error}") from None
    if canonical != body:
        raise LedgerError("not written in the form of a ledger")
    return entry


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _event(item: list[Any]) -> SampledGaussian:
    sigma, q, steps = item
    if [type(value) for value in item] != [float, float, int]:
        raise TypeError("segments have the wrong type")
    return SampledGaussian(sigma, q, steps)


def hash_after(previous: str, body: str) -> str:
    """The hash of an entry that follows the entry with hash ``previous``."""
    return hashlib.sha256(f"{previous}\n{body}".encode()).hexdigest()


def read_chain(rows: Iterable[tuple[Any, Any, Any]], first: int = 0, previous: str = NO_HASH) -> Iterator[tuple[Entry, str]]:
    """The entries and their hashes of (number, body, hash) rows, from number ``first`` on, which follows hash ``previous``.

    Guarantee: every hash was recomputed; a change to any byte of any entry, an entry left out, added or moved, raises.
    Entries missing at the end cannot be seen.

    Raises:
        LedgerError: naming the first entry that does not fit.
    """
    for expected, (number, body, digest) in enumerate(rows, first):
        if number != expected:
            raise LedgerError(f"entry {expected} is missing")
        if not isinstance(body, str) or not isinstance(digest, str) or hash_after(previous, body) != digest:
            raise LedgerError(f"entry {number}: its hash does not fit; the ledger was changed")
        try:
            entry = from_json(body)
        except LedgerError as error:
            raise LedgerError(f"entry {number}: {error}") from None
        if isinstance(entry, Genesis) != (number == 0) or (isinstance(entry, Genesis) and entry.format != FORMAT):
            raise LedgerError(f"entry {number}: not a ledger of this version")
        yield entry, digest
        previous = digest
