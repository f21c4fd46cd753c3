"""A run's ledger: reserved steps count at once, unused ones are given back, and no cap is passed."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from flwr.app import ConfigRecord
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lalora_flwr.ground.errors import BudgetExhausted
from lalora_flwr.privacy.accounting import epsilon_spent
from lalora_flwr.privacy.counting import RunLedger, history_from
from lalora_flwr.privacy.events import SampledGaussian, Target

DELTA = 1e-4


def ledger(max_epsilon: float = 100.0, max_steps: int = 1000, history: list[SampledGaussian] | None = None) -> RunLedger:
    return RunLedger(Target(max_epsilon, DELTA, max_steps, "rdp"), history or [])


def spent(*history: SampledGaussian) -> float:
    return epsilon_spent(history, DELTA, "rdp")


def take(book: RunLedger, steps: int) -> None:
    for _ in range(steps):
        book.take_step()


def reborn(book: RunLedger, max_epsilon: float = 100.0, max_steps: int = 1000) -> RunLedger:
    """The ledger after the process died: all that is left is the state Flower kept."""
    return ledger(max_epsilon, max_steps, history_from(ConfigRecord(book.state())))  # type: ignore[arg-type]


def test_a_new_ledger_has_spent_nothing() -> None:
    assert ledger().steps == 0
    assert ledger().epsilon() == 0.0


def test_a_reservation_counts_at_once_and_taking_its_steps_adds_nothing() -> None:
    book = ledger()
    book.reserve(2.0, 0.1, 10)
    assert book.steps == 10
    assert book.epsilon() == spent((2.0, 0.1, 10))
    take(book, 10)
    book.commit()
    assert book.steps == 10
    assert book.epsilon() == spent((2.0, 0.1, 10))


@pytest.mark.parametrize("taken", [0, 1, 9, 10])
def test_commit_gives_back_exactly_what_was_not_taken(taken: int) -> None:
    book = ledger()
    book.reserve(2.0, 0.1, 5)
    take(book, 5)
    book.commit()
    book.reserve(2.0, 0.1, 10)
    take(book, taken)
    book.commit()
    assert book.steps == 5 + taken
    assert book.epsilon() == spent((2.0, 0.1, 5 + taken))
    with pytest.raises(BudgetExhausted):
        book.take_step()


def test_a_crash_after_reserve_leaves_the_whole_reservation_counted() -> None:
    book = ledger()
    book.reserve(2.0, 0.1, 10)
    take(book, 3)
    after = reborn(book)
    assert after.steps == 10
    assert after.epsilon() == spent((2.0, 0.1, 10)) > spent((2.0, 0.1, 3))
    with pytest.raises(BudgetExhausted):
        after.take_step()  # what was reserved before the crash cannot be taken after it
    after.commit()
    assert after.steps == 10


def test_no_step_beyond_the_reservation() -> None:
    book = ledger()
    with pytest.raises(BudgetExhausted):
        book.take_step()
    book.reserve(2.0, 0.1, 3)
    take(book, 3)
    with pytest.raises(BudgetExhausted):
        book.take_step()
    assert book.steps == 3


def test_a_second_reservation_while_one_is_open_is_an_error_and_counts_nothing() -> None:
    book = ledger()
    book.reserve(2.0, 0.1, 3)
    with pytest.raises(RuntimeError):
        book.reserve(2.0, 0.1, 3)
    assert book.steps == 3


@pytest.mark.parametrize("max_epsilon", [100.0, math.inf])
def test_the_cap_in_steps_holds_over_all_rounds_and_a_refusal_counts_nothing(max_epsilon: float) -> None:
    book = ledger(max_epsilon, max_steps=20)
    for _ in range(2):
        book.reserve(2.0, 0.1, 8)
        take(book, 8)
        book.commit()
    before = book.state()
    with pytest.raises(BudgetExhausted):
        book.reserve(2.0, 0.1, 5)
    with pytest.raises(BudgetExhausted):
        book.take_step()
    assert book.state() == before
    book.reserve(2.0, 0.1, 4)
    assert book.steps == 20


def test_the_cap_in_epsilon_holds_for_the_composition_and_a_refusal_counts_nothing() -> None:
    cap = spent((1.0, 0.2, 10), (2.0, 0.1, 10))
    assert spent((2.0, 0.1, 11)) < cap  # what is refused below would fit alone
    book = ledger(max_epsilon=cap)
    book.reserve(1.0, 0.2, 10)
    take(book, 10)
    book.commit()
    before = book.state()
    with pytest.raises(BudgetExhausted):
        book.reserve(2.0, 0.1, 11)
    with pytest.raises(BudgetExhausted):
        book.take_step()
    assert book.state() == before
    book.reserve(2.0, 0.1, 10)
    assert book.epsilon() == cap


def test_a_step_without_noise_fits_no_finite_epsilon() -> None:
    with pytest.raises(BudgetExhausted):
        ledger(max_epsilon=100.0).reserve(0.0, 0.1, 1)
    book = ledger(max_epsilon=math.inf)
    book.reserve(0.0, 0.1, 1)
    assert book.epsilon() == math.inf


def test_caps_hold_after_a_restart() -> None:
    book = ledger(max_steps=20)
    book.reserve(2.0, 0.1, 15)
    with pytest.raises(BudgetExhausted):
        reborn(book, max_steps=20).reserve(2.0, 0.1, 6)
    with pytest.raises(BudgetExhausted):
        reborn(book, max_epsilon=spent((2.0, 0.1, 15))).reserve(2.0, 0.1, 1)


def test_state_survives_flowers_record_and_back() -> None:
    book = ledger()
    for sigma, q, steps in ((2.0, 0.1, 3), (2.0, 0.1, 4), (0.7, 1.0, 1), (2.0, 0.1, 5)):
        book.reserve(sigma, q, steps)
        take(book, steps)
        book.commit()
    history = history_from(ConfigRecord(book.state()))  # type: ignore[arg-type]
    assert history == [(2.0, 0.1, 7), (0.7, 1.0, 1), (2.0, 0.1, 5)]
    assert all(isinstance(steps, int) for _, _, steps in history)
    after = reborn(book)
    assert (after.state(), after.steps, after.epsilon()) == (book.state(), book.steps, book.epsilon())


def test_an_empty_state_survives_flowers_record_and_back() -> None:
    assert history_from(ConfigRecord(ledger().state())) == []  # type: ignore[arg-type]
    assert reborn(ledger()).steps == 0


def test_a_ledger_does_not_share_its_history_with_its_caller() -> None:
    history: list[SampledGaussian] = [SampledGaussian(2.0, 0.1, 3)]
    book = ledger(history=history)
    book.reserve(2.0, 0.1, 2)
    book.state()["steps"].clear()
    assert history == [(2.0, 0.1, 3)]
    assert book.steps == 5


def test_the_ledgers_accountant_and_delta_are_those_it_was_given() -> None:
    history: list[SampledGaussian] = [SampledGaussian(2.0, 0.1, 30)]
    for accountant in ("prv", "rdp"):
        for delta in (1e-3, 1e-6):
            assert RunLedger(Target(9.0, delta, 99, accountant), history).epsilon() == epsilon_spent(history, delta, accountant)


class Crashes(RuleBasedStateMachine):
    """Any order of reserve, take, commit and crash: ε covers every step taken, and no cap is passed."""

    max_steps, max_epsilon = 60, 6.0

    def __init__(self) -> None:
        super().__init__()
        self.book = ledger(self.max_epsilon, self.max_steps)
        self.open, self.kind = 0, (3.0, 1.0)
        self.taken: Counter[tuple[float, float]] = Counter()

    @rule(kind=st.sampled_from([(3.0, 1.0), (5.0, 1.0), (8.0, 1.0)]), steps=st.integers(1, 12))
    def reserve(self, kind: tuple[float, float], steps: int) -> None:
        before = self.book.state()
        try:
            self.book.reserve(*kind, steps)
        except (BudgetExhausted, RuntimeError):
            assert self.book.state() == before
        else:
            self.open, self.kind = steps, kind

    @rule()
    def take(self) -> None:
        if self.open:
            self.book.take_step()
            self.open -= 1
            self.taken[self.kind] += 1
        else:
            with pytest.raises(BudgetExhausted):
                self.book.take_step()

    @precondition(lambda self: self.open)
    @rule()
    def take_all(self) -> None:
        while self.open:
            self.take()

    @rule()
    def commit(self) -> None:
        self.book.commit()
        self.open = 0

    @rule()
    def crash(self) -> None:
        self.book = reborn(self.book, self.max_epsilon, self.max_steps)
        self.open = 0

    @invariant()
    def epsilon_covers_every_step_taken(self) -> None:
        assert self.book.steps >= sum(self.taken.values()) + self.open
        assert self.book.epsilon() >= spent(*((s, q, n) for (s, q), n in self.taken.items())) - 1e-9

    @invariant()
    def caps_hold(self) -> None:
        assert self.book.steps <= self.max_steps
        assert self.book.epsilon() <= self.max_epsilon


TestCrashes = Crashes.TestCase
TestCrashes.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


@pytest.mark.parametrize(
    ("sigma", "q", "steps"), [(1.0, 0.1, 0), (1.0, 0.1, -5), (-1.0, 0.1, 1), (math.nan, 0.1, 1), (1.0, 0.0, 1), (1.0, 1.5, 1)]
)
def test_what_is_no_step_cannot_be_reserved(sigma: float, q: float, steps: int) -> None:
    counted = RunLedger(Target(math.inf, 1e-5, 100, "rdp"), [SampledGaussian(1.0, 0.1, 10)])
    with pytest.raises(ValueError, match=r"not steps|no step"):
        counted.reserve(sigma, q, steps)
    assert counted.steps == 10
