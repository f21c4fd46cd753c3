"""The durable ledger that a real site owns, as training sees it: check → reserve → take steps → commit.

Two limits hold at once: the owner's, ε at δ over everything ever done to a dataset, and the run's own, which its noise
was calibrated for. Both are composed from the file, so neither restarting the site nor a new run resets anything.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import lru_cache

from lalora_flwr.ground.errors import BudgetExhausted, SiteRefusal
from lalora_flwr.ledger.book import Book, Records
from lalora_flwr.ledger.content import Appended
from lalora_flwr.ledger.entries import EVALUATE, Commit, Reserve, SharedReserve, clock, written
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.ledger.sharing import Sharing, counted
from lalora_flwr.privacy.accounting import HEADLINE
from lalora_flwr.privacy.composition.composer import Composer
from lalora_flwr.privacy.counting import Compose, RunLedger, at_least
from lalora_flwr.privacy.events import SampledGaussian, Target

log = logging.getLogger("lalora_flwr.site")
ACCOUNTANT = HEADLINE  # composes every dataset's ε, whatever a run calibrates with


@dataclass(frozen=True)
class Request:
    """Who asks for a round on which records, and what the run calibrated its noise for.

    With the ``schedule`` `EVALUATE` it asks for a noised answer about the run's adapter: its step counts into the dataset's
    ε and the day's queries, and is held to neither the run's ε nor its steps, which are those of training.

    ``counted_steps``, of which ``counted_before`` were for a ridge head, are those the server counted for the run before. A
    resumed run has a new id, so its own count starts from them; they can only raise it, and the dataset's budget never looks at
    them.

    With a ``sharing`` the steps' noise is shared in a secure sum.
    """

    run: str
    strategy: str
    server_round: int
    schedule: str
    dataset: str
    clip_norm: float
    target: Target
    counted_steps: int = 0
    counted_before: int = 0
    sharing: Sharing | None = None

    @property
    def evaluates(self) -> bool:
        return self.schedule == EVALUATE


class SiteLedger:
    """A `Ledger` for one round or one evaluation, backed by the site's file.

    Guarantee: when `take_step` returns, the step is on disk within a reservation that the owner's budget had room for,
    next to all open reservations of other processes. No order of calls, crashes and restarts takes it back; only
    `commit` gives back steps that this object reserved and did not take. If the file cannot be used, nothing is taken.
    """

    def __init__(
        self,
        file: LedgerFile,
        request: Request,
        max_epsilon: float,
        delta: float,
        compose: Compose | None = None,
        *,
        max_queries_per_day: float = math.inf,
        max_epsilon_alone: float = math.inf,
        alert_epsilon: float = math.inf,
        clock: Callable[[], datetime] = clock,
    ) -> None:
        """Nothing is read yet.

        Args:
            file: the ledger.
            request: who asks.
            max_epsilon, delta: the owner's budget for the dataset.
            compose: makes ε of steps; default: the accountant, with what it keeps in the ledger's cache folder.
            max_queries_per_day: most reservations on the dataset in 24 hours; see `Book.recent`.
            max_epsilon_alone: the owner's budget for all that is done to the dataset, if all other sites of its secure sums side
                with the server.
            alert_epsilon: the log has a warning when the dataset's ε reaches it.
            clock: the site's time, with its zone.
        """
        self._file, self._request = file, request
        self._max_epsilon, self._delta = max_epsilon, delta
        self._max_queries_per_day, self._clock = max_queries_per_day, clock
        self._max_epsilon_alone, self._alert_epsilon = max_epsilon_alone, alert_epsilon
        self._compose = _remembering(compose or _composer(file))
        self._fingerprint = ""
        self._run: RunLedger | None = None  # counts the steps to take, from the moment they were reserved
        self._open: Appended | None = None  # the open reservation
        self._reserved = 0  # its steps

    def identify(self, fingerprint: str) -> None:
        """Say which records will be used; needed before `reserve`."""
        self._fingerprint = fingerprint

    def queries_today(self) -> int:
        """Reservations on the dataset that count into the owner's max-queries-per-day now."""
        return self._file.state().book.recent(self._request.dataset, self._clock())

    def spent(self) -> float:
        """ε that the dataset has spent at the owner's δ, open reservations included."""
        return self._compose(self._file.state().book.segments(self._request.dataset), self._delta, ACCOUNTANT)

    def check(self, noise_multiplier: float, sample_rate: float, steps: int) -> None:
        """Refuse already now what `reserve` would refuse; counts nothing.

        Raises:
            BudgetExhausted, SiteRefusal, LedgerError: as `reserve`.
        """
        self._file.check_writable()
        self._admit(self._file.state().book, noise_multiplier, sample_rate, steps, fingerprint="")

    def reserve(self, noise_multiplier: float, sample_rate: float, steps: int) -> None:
        """As `Ledger.reserve`. The entry follows exactly what was checked: two runs at once never spend the same ε twice.

        Raises:
            BudgetExhausted: the run or the dataset has no room for the steps.
            SiteRefusal: the same records are in the ledger under another dataset's name, or the owner allows no more
                queries today.
            LedgerError: the file cannot be used.
        """
        if self._open is not None:
            raise RuntimeError("a reservation is open: commit it first")
        if not self._fingerprint:
            raise RuntimeError("no records were named for these steps")
        request = self._request
        entry: Reserve | None = None
        before: Records | None = None
        alerting, spent = self._alert_epsilon < math.inf, math.inf

        def make(book: Book) -> Reserve:
            nonlocal entry, before, spent
            spent = self._compose(book.segments(request.dataset), self._delta, ACCOUNTANT) if alerting else math.inf
            self._run, entry = self._admit(book, noise_multiplier, sample_rate, steps, self._fingerprint)
            before = book.records_of(request.dataset)
            before = replace(before) if before else None  # the book goes on
            return entry

        self._run = None
        self._open, self._reserved = self._file.append(make), steps
        assert entry is not None
        if before and before.fingerprint != self._fingerprint:
            log.warning(
                "dataset %s: its records have changed since the last round with the earlier ones (%s, in use since %s); "
                "what was spent on it stays spent",
                *(request.dataset, before.until, before.since),
            )
        if spent < self._alert_epsilon <= entry.epsilon:
            log.warning("dataset %s: epsilon has reached alert-epsilon = %g", request.dataset, self._alert_epsilon)
        log.info(
            "run %s, round %d, %s: reserved %d steps; epsilon of dataset %s is now %.4g of %.4g at delta %g; %s",
            *(request.run, request.server_round, request.schedule, steps, request.dataset),
            *(entry.epsilon, self._max_epsilon, self._delta, _head(self._open)),
        )

    def _admit(self, book: Book, sigma: float, q: float, steps: int, fingerprint: str) -> tuple[RunLedger, Reserve]:
        new = SampledGaussian(sigma, q, steps)
        if not new.noisy:
            raise ValueError(f"{steps} steps at σ = {sigma}, q = {q}: not noisy steps of the mechanism")
        request, clock = self._request, self._clock()
        named = book.dataset_of(fingerprint)
        if fingerprint and named not in (None, request.dataset):
            raise SiteRefusal("dataset: the site's records are in its ledger under another name")
        if not book.recent(request.dataset, clock) < self._max_queries_per_day:
            raise SiteRefusal("cap: the site has answered as many queries today as max-queries-per-day allows")
        if request.evaluates:
            run = RunLedger(request.target._replace(epsilon=math.inf, steps=steps))
        else:
            before = request.target.begun(request.counted_before)
            history = at_least(self._history(book), request.counted_steps, sigma, q, before)
            run = self._run_ledger(history)
        run.reserve(sigma, q, steps)
        segments = book.segments(request.dataset, plus=new)
        epsilon = self._compose(segments, self._delta, ACCOUNTANT)
        if not epsilon <= self._max_epsilon:
            raise BudgetExhausted("budget: the site's records have no epsilon left for this round")
        entry = Reserve(
            time=written(clock),
            run=request.run,
            strategy=request.strategy,
            round=request.server_round,
            schedule=request.schedule,
            dataset=request.dataset,
            fingerprint=fingerprint,
            sigma=sigma,
            q=q,
            clip_norm=request.clip_norm,
            steps=steps,
            run_epsilon=request.target.epsilon,
            run_delta=request.target.delta,
            run_steps=request.target.steps,
            run_accountant=request.target.accountant,
            max_epsilon=self._max_epsilon,
            accountant=ACCOUNTANT,
            delta=self._delta,
            epsilon=epsilon,
            segments=segments,
        )
        own = counted(request.sharing.share) if request.sharing else sigma
        alone = book.alone(request.dataset, plus=new._replace(noise_multiplier=own))
        if request.sharing:
            entry = self._shared(book, entry, request.sharing, alone)
        if not self._max_epsilon_alone == math.inf and not self._alone(alone) <= self._max_epsilon_alone:
            raise BudgetExhausted("budget: the site's records have no epsilon left for this round if all other sites collude")
        return run, entry

    def _alone(self, alone: tuple[SampledGaussian, ...]) -> float:
        return self._compose(alone, self._delta, ACCOUNTANT)

    def _shared(self, book: Book, entry: Reserve, sharing: Sharing, alone: tuple[SampledGaussian, ...]) -> SharedReserve:
        """
        Raises:
            SiteRefusal: the site took part in the attempt, or a later one, before: its masks are good for one answer.
        """
        if not book.is_new(sharing.key, entry.run, entry.round, sharing.attempt):
            raise SiteRefusal("sharing: the site has answered this attempt, or a later one, before")
        common = {f.name: getattr(entry, f.name) for f in fields(entry)}
        return SharedReserve(**common, **vars(sharing), alone_epsilon=self._alone(alone), alone=alone)

    def take_step(self) -> None:
        if self._open is None or self._run is None:
            raise BudgetExhausted("budget: no reserved step is left")
        self._run.take_step()

    def commit(self) -> None:
        """As `Ledger.commit`; without an open reservation it does nothing.

        Raises:
            LedgerError: the file cannot be used. The whole reservation then stays counted.
        """
        if self._open is None or self._run is None:
            return
        reservation, self._open = self._open, None  # no further step, even if the file fails now
        taken = self._reserved - self._run.left
        commit = Commit(time=written(self._clock()), reserve=reservation.number, taken=taken)
        appended = self._file.append(lambda _: commit, behind=(reservation.number, reservation.hash))
        self._run.commit()
        log.info(
            "run %s, round %d, %s: took %d of %d reserved steps; %s",
            *(self._request.run, self._request.server_round, self._request.schedule, taken, self._reserved, _head(appended)),
        )

    @property
    def steps(self) -> int:
        """Training steps of the run on this dataset, open reservations included."""
        return self._counted().steps

    def epsilon(self) -> float:
        """The ε of the run's training at the run's own δ; the dataset's total is no business of the server."""
        return self._counted().epsilon()

    def _counted(self) -> RunLedger:
        if self._run and not self._request.evaluates:
            return self._run
        return self._run_ledger(self._history(self._file.state().book))

    def _history(self, book: Book) -> tuple[SampledGaussian, ...]:
        return book.run_segments(self._request.dataset, self._request.run)

    def _run_ledger(self, history: Sequence[SampledGaussian]) -> RunLedger:
        return RunLedger(self._request.target, history, self._compose)


def _head(appended: Appended) -> str:
    """What the owner's log keeps of the ledger: with it, `lalora ledger verify --head` finds an older copy."""
    return f"ledger {appended.ledger} had {appended.number + 1} entries at {written(clock())}, head {appended.hash}"


def _composer(file: LedgerFile) -> Compose:
    """The accountant, with what it keeps between processes in the ledger's cache folder."""
    composer = Composer(file.cache / "composed")

    def compose(history: Sequence[SampledGaussian], delta: float, accountant: str) -> float:
        file.make_cache()
        return composer(history, delta, accountant)

    return compose


def _remembering(compose: Compose) -> Compose:
    """The same ε without composing it again: check, reserve and reply ask for the same sums."""
    known = lru_cache(maxsize=16)(compose)
    return lambda history, delta, accountant: known(tuple(history), delta, accountant)
