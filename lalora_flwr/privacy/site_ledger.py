"""The durable ledger that a real site owns, as training sees it: check → reserve → take steps → commit.

Two limits hold at once: the owner's, ε at δ over everything ever done to a dataset, and the run's own, which its noise
was calibrated for. Both are composed from the file, so neither restarting the site nor a new run resets anything.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from lalora_flwr.errors import BudgetExhausted, LedgerError, SiteRefusal
from lalora_flwr.privacy.accounting import Segment, epsilon_spent
from lalora_flwr.privacy.ledger import Compose, RunLedger, at_least
from lalora_flwr.privacy.ledger_book import Book
from lalora_flwr.privacy.ledger_entries import Commit, Reserve, is_step, now
from lalora_flwr.privacy.ledger_file import LedgerFile, Writer

log = logging.getLogger("lalora_flwr.site")
ACCOUNTANT = "prv"  # composes every dataset's ε, whatever a run calibrates with


@dataclass(frozen=True)
class Request:
    """Who asks for a round on which records, and what the run calibrated its noise for.

    ``counted_steps`` are those the server counted for the run before. A resumed run has a new id, so its own count
    starts from them; they can only raise it, and the dataset's budget never looks at them.
    """

    run: str
    strategy: str
    server_round: int
    schedule: str
    dataset: str
    clip_norm: float
    run_epsilon: float
    run_delta: float
    run_steps: int
    run_accountant: str
    counted_steps: int = 0

    @property
    def target(self) -> tuple[float, float, int, str]:
        return self.run_epsilon, self.run_delta, self.run_steps, self.run_accountant


class SiteLedger:
    """A `Ledger` for one round, backed by the site's file.

    Guarantee: when `take_step` returns, the step is on disk within a reservation that the owner's budget had room for,
    next to all open reservations of other processes. No order of calls, crashes and restarts takes it back; only
    `commit` gives back steps that this object reserved and did not take. If the file cannot be used, nothing is taken.
    """

    def __init__(
        self, file: LedgerFile, request: Request, max_epsilon: float, delta: float, compose: Compose = epsilon_spent
    ) -> None:
        """``max_epsilon`` at ``delta`` is the owner's budget for the dataset; ``compose`` makes ε of steps."""
        self._file, self._request = file, request
        self._max_epsilon, self._delta, self._compose = max_epsilon, delta, compose
        self._fingerprint = ""
        self._run: RunLedger | None = None  # the run's count, from the moment steps were reserved
        self._open: tuple[int, str] | None = None  # number and hash of the open reservation's entry

    def identify(self, fingerprint: str) -> None:
        """Say which records will be trained on; needed before `reserve`."""
        self._fingerprint = fingerprint

    def known_noise(self, sample_rate: float) -> float | None:
        """σ as calibrated before for the same target and q; it follows from those alone, and takes seconds to find."""
        for r in self._file.read().book.reservations.values():
            known = (r.entry.run_epsilon, r.entry.run_delta, r.entry.run_steps, r.entry.run_accountant)
            if known == self._request.target and r.entry.q == sample_rate:
                return r.entry.sigma
        return None

    def check(self, noise_multiplier: float, sample_rate: float, steps: int) -> None:
        """Refuse already now what `reserve` would refuse; counts nothing.

        Raises:
            BudgetExhausted, LedgerError: as `reserve`.
        """
        with self._file.transaction(dry=True) as writer:
            self._admit(writer, noise_multiplier, sample_rate, steps, fingerprint="")

    def reserve(self, noise_multiplier: float, sample_rate: float, steps: int) -> None:
        """As `Ledger.reserve`. Check and entry are one transaction: two runs at once never spend the same ε twice.

        Raises:
            BudgetExhausted: the run or the dataset has no room for the steps.
            SiteRefusal: the same records are in the ledger under another dataset's name.
            LedgerError: the file cannot be used.
        """
        if self._open is not None:
            raise RuntimeError("a reservation is open: commit it first")
        if not self._fingerprint:
            raise RuntimeError("nobody said which records these steps are about")
        with self._file.transaction() as writer:
            number, run, epsilon = self._admit(writer, noise_multiplier, sample_rate, steps, self._fingerprint)
            own_hash = writer.hash_of(number)
        self._open, self._run = (number, own_hash), run
        log.info(
            "run %s, round %d: reserved %d steps, entry %d of the ledger; epsilon of dataset %s is now %.4g of %.4g at delta %g",
            *(self._request.run, self._request.server_round, steps, number),
            *(self._request.dataset, epsilon, self._max_epsilon, self._delta),
        )

    def _admit(self, writer: Writer, sigma: float, q: float, steps: int, fingerprint: str) -> tuple[int, RunLedger, float]:
        if not is_step(sigma, q, steps):
            raise ValueError(f"{steps} steps at σ = {sigma}, q = {q}: not noisy steps of the mechanism")
        request = self._request
        named = writer.book.dataset_of(fingerprint)
        if fingerprint and named not in (None, request.dataset):
            raise SiteRefusal("dataset: the site's records are in its ledger under another name")
        run = self._run_ledger(at_least(self._history(writer.book), request.counted_steps, sigma, q))
        run.reserve(sigma, q, steps)
        segments = writer.book.segments(request.dataset, plus=(sigma, q, steps))
        epsilon = self._compose(segments, self._delta, ACCOUNTANT)
        if not epsilon <= self._max_epsilon:
            raise BudgetExhausted("budget: the site's records have no epsilon left for this round")
        entry = Reserve(
            time=now(),
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
            run_epsilon=request.run_epsilon,
            run_delta=request.run_delta,
            run_steps=request.run_steps,
            run_accountant=request.run_accountant,
            max_epsilon=self._max_epsilon,
            accountant=ACCOUNTANT,
            delta=self._delta,
            epsilon=epsilon,
            segments=segments,
        )
        return writer.append(entry), run, epsilon

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
        (number, own_hash), self._open = self._open, None  # no further step, even if the file fails now
        with self._file.transaction() as writer:
            if writer.hash_of(number) != own_hash:
                raise LedgerError("not the ledger in which the steps were reserved")
            reserved = writer.book.reservations[number].counted
            writer.append(Commit(time=now(), reserve=number, taken=reserved - self._run.left))
        self._run.commit()

    @property
    def steps(self) -> int:
        """Steps of the run on this dataset, open reservations included."""
        return self._counted().steps

    def epsilon(self) -> float:
        """The run's ε at the run's own δ; the dataset's total is no business of the server."""
        return self._counted().epsilon()

    def _counted(self) -> RunLedger:
        return self._run or self._run_ledger(self._history(self._file.read().book))

    def _history(self, book: Book) -> tuple[Segment, ...]:
        return book.run_segments(self._request.dataset, self._request.run)

    def _run_ledger(self, history: Sequence[Segment]) -> RunLedger:
        epsilon, delta, steps, accountant = self._request.target
        return RunLedger(epsilon, steps, delta, accountant, history, self._compose)
