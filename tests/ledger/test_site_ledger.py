"""A site's ledger in any order of rounds, crashes and restarts counts as a naive sum does."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from lalora_flwr.ground.errors import BudgetExhausted
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.privacy.events import SampledGaussian
from tests.ledger.site_ledgers import DELTA, compose, new_ledger, session, target

MAX_EPSILON, RUN_EPSILON, RUN_STEPS = 0.8, 0.6, 30


Q = 0.1


class Naive:
    """The same promises in a list that never dies: [dataset, run, σ, steps]."""

    def __init__(self) -> None:
        self.counted: list[list] = []

    def segments(self, dataset: str, run: str | None = None) -> list[SampledGaussian]:
        total: Counter[float] = Counter()
        for its, ran, sigma, steps in self.counted:
            if its == dataset and run in (None, ran):
                total[sigma] += steps
        return [(sigma, Q, steps) for sigma, steps in sorted(total.items()) if steps]

    def reserve(self, dataset: str, run: str, sigma: float, steps: int) -> int | None:
        self.counted.append([dataset, run, sigma, steps])
        mine = self.segments(dataset, run)
        if (
            sum(n for *_, n in mine) > RUN_STEPS
            or compose(mine, DELTA, "") > RUN_EPSILON
            or compose(self.segments(dataset), DELTA, "") > MAX_EPSILON
        ):
            self.counted.pop()
            return None
        return len(self.counted) - 1


class OneRound:
    """A session and what the naive ledger knows of it."""

    def __init__(self, path: Path, dataset: str, run: str) -> None:
        self.dataset, self.run = dataset, run
        self.ledger = session(path, MAX_EPSILON, dataset=dataset, run=run, target=target(epsilon=RUN_EPSILON, steps=RUN_STEPS))
        self.place: int | None = None
        self.left = self.taken = 0


class SitesOnOneFile(RuleBasedStateMachine):
    """Sessions open, reserve, take, commit and die in any order, several at once."""

    rounds = Bundle("rounds")

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self.path = new_ledger(Path(self.folder.name))
        self.naive = Naive()
        self.released: Counter[tuple[str, float]] = Counter()

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(target=rounds, dataset=st.sampled_from("ab"), run=st.sampled_from("12"))
    def open(self, dataset: str, run: str) -> OneRound:
        return OneRound(self.path, dataset, run)

    @rule(r=rounds, sigma=st.sampled_from([0.8, 1.0, 3.0]), steps=st.integers(1, 9))
    def reserve(self, r: OneRound, sigma: float, steps: int) -> None:
        if r.place is not None:
            with pytest.raises(RuntimeError):
                r.ledger.reserve(sigma, Q, steps)
            return
        r.place = self.naive.reserve(r.dataset, r.run, sigma, steps)
        if r.place is None:
            for refused in (r.ledger.check, r.ledger.reserve):
                with pytest.raises(BudgetExhausted, match=r"^budget: "):
                    refused(sigma, Q, steps)
        else:
            r.ledger.check(sigma, Q, steps)
            r.ledger.reserve(sigma, Q, steps)
            r.left, r.taken = steps, 0

    @rule(r=rounds, steps=st.integers(1, 9))
    def take(self, r: OneRound, steps: int) -> None:
        for _ in range(steps):
            if r.place is None or not r.left:
                with pytest.raises(BudgetExhausted):
                    r.ledger.take_step()
                return
            r.ledger.take_step()
            r.left, r.taken = r.left - 1, r.taken + 1
            self.released[r.dataset, self.naive.counted[r.place][2]] += 1

    @rule(r=rounds)
    def commit(self, r: OneRound) -> None:
        r.ledger.commit()
        if r.place is not None:
            self.naive.counted[r.place][3] = r.taken
        r.place, r.left = None, 0

    @rule(r=rounds)
    def die(self, r: OneRound) -> None:
        """The process is gone; its reservation stays. Another one serves the next round of the same run."""
        r.ledger, r.place, r.left = OneRound(self.path, r.dataset, r.run).ledger, None, 0

    @invariant()
    def same_as_naive(self) -> None:
        for book in (LedgerFile(self.path).read().book, LedgerFile(self.path).state().book):
            for dataset in "ab":
                assert list(book.segments(dataset)) == self.naive.segments(dataset)
                assert compose(book.segments(dataset), DELTA, "") <= MAX_EPSILON
                for run in "12":
                    assert list(book.run_segments(dataset, run)) == self.naive.segments(dataset, run)

    @invariant()
    def covers_what_was_released(self) -> None:
        book = LedgerFile(self.path).read().book
        for (dataset, sigma), steps in self.released.items():
            assert {s: n for s, _, n in book.segments(dataset)}[sigma] >= steps


TestSitesOnOneFile = SitesOnOneFile.TestCase


TestSitesOnOneFile.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
