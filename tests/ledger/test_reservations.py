"""What a reservation says, what it is held to, and what is given back."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lalora_flwr.ground.errors import BudgetExhausted, LedgerError, SiteRefusal
from lalora_flwr.ledger.entries import Reserve
from lalora_flwr.ledger.file import LedgerFile, create
from lalora_flwr.ledger.site_ledger import SiteLedger
from lalora_flwr.privacy.accounting import HEADLINE, epsilon_spent
from tests.ledger.site_ledgers import DELTA, compose, request, serve, session, target
from tests.ledger.sums import total


def test_a_reserve_entry_says_who_asked_for_what_and_where_it_leads(path: Path) -> None:
    serve(path, 2.0, 0.1, 4)
    serve(path, 1.0, 0.2, 3, run="18446744073709551615", server_round=2, strategy="rolora", schedule="round:BA", clip_norm=0.5)
    entry = LedgerFile(path).read().entries[3]
    assert isinstance(entry, Reserve)
    assert (entry.run, entry.strategy, entry.round, entry.schedule) == ("18446744073709551615", "rolora", 2, "round:BA")
    assert (entry.dataset, entry.fingerprint) == ("default", "records of default")
    assert (entry.sigma, entry.q, entry.clip_norm, entry.steps) == (1.0, 0.2, 0.5, 3)
    assert entry.segments == ((1.0, 0.2, 3), (2.0, 0.1, 4))
    assert (entry.accountant, entry.delta, entry.max_epsilon) == (HEADLINE, DELTA, 1e6)
    assert entry.epsilon == compose(entry.segments, DELTA, HEADLINE)


def test_the_real_accountant_composes_over_runs_and_restarts(path: Path) -> None:
    for run in ("1", "2"):
        ledger = SiteLedger(LedgerFile(path), request(run=run), 1e6, DELTA)
        ledger.identify("x")
        ledger.reserve(1.5, 0.1, 40)
        for _ in range(40):
            ledger.take_step()
        ledger.commit()
        assert ledger.steps == 40
        assert ledger.epsilon() == epsilon_spent([(1.5, 0.1, 40)], DELTA)
    one, both = epsilon_spent([(1.5, 0.1, 40)], DELTA), epsilon_spent([(1.5, 0.1, 80)], DELTA)
    last = LedgerFile(path).read().entries[3]
    assert isinstance(last, Reserve) and last.epsilon == both
    assert one < both < 2 * one


def test_the_owners_budget_stops_a_run_that_its_own_would_not(path: Path) -> None:
    room = compose([(1.0, 0.1, 10)], DELTA, "")
    serve(path, steps=6, max_epsilon=room)
    with pytest.raises(BudgetExhausted, match=r"^budget: the site's records"):
        serve(path, steps=5, max_epsilon=room, run="another")
    serve(path, steps=4, max_epsilon=room, run="another")
    assert total(path) == ((1.0, 0.1, 10),)


def test_each_dataset_has_its_own_budget(path: Path) -> None:
    room = compose([(1.0, 0.1, 6)], DELTA, "")
    for dataset in ("a", "b"):
        serve(path, steps=6, max_epsilon=room, dataset=dataset)
    assert total(path, "a") == total(path, "b") == ((1.0, 0.1, 6),)


def test_the_same_records_under_another_name_are_refused_and_changed_records_go_on_counting(path: Path) -> None:
    serve(path, dataset="a", fingerprint="x")
    ledger = session(path, dataset="b", fingerprint="x")
    with pytest.raises(SiteRefusal, match="under another name"):
        ledger.reserve(1.0, 0.1, 3)
    serve(path, dataset="a", fingerprint="y")
    assert total(path, "a") == ((1.0, 0.1, 6),) and total(path, "b") == ()


def test_open_reservations_of_others_count_in_full(path: Path) -> None:
    room = compose([(1.0, 0.1, 10)], DELTA, "")
    first, second = session(path, room), session(path, room, run="2")
    first.reserve(1.0, 0.1, 7)
    with pytest.raises(BudgetExhausted):
        second.reserve(1.0, 0.1, 4)
    first.take_step()
    first.commit()
    second.reserve(1.0, 0.1, 4)
    assert total(path) == ((1.0, 0.1, 5),)


def test_a_check_counts_nothing(path: Path) -> None:
    before = path.read_bytes()
    session(path).check(1.0, 0.1, 3)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize(
    ("sigma", "q", "steps"),
    [(0.0, 0.1, 1), (-1.0, 0.1, 1), (math.nan, 0.1, 1), (math.inf, 0.1, 1), (1.0, 0.0, 1), (1.0, 1.1, 1), (1.0, 0.1, 0)],
)
def test_what_is_no_noisy_step_cannot_be_reserved(sigma: float, q: float, steps: int, path: Path) -> None:
    for refused in (session(path).check, session(path).reserve):
        with pytest.raises(ValueError, match="not noisy steps"):
            refused(sigma, q, steps)
    assert total(path) == ()


def test_an_epsilon_that_is_no_number_is_no_room(path: Path) -> None:
    ledger = SiteLedger(LedgerFile(path), request(), 5.0, DELTA, lambda *_: math.nan)
    ledger.identify("x")
    with pytest.raises(BudgetExhausted):
        ledger.reserve(1.0, 0.1, 1)


def test_nothing_is_reserved_before_the_records_are_known(path: Path) -> None:
    ledger = SiteLedger(LedgerFile(path), request(), 5.0, DELTA, compose)
    with pytest.raises(RuntimeError, match="no records were named"):
        ledger.reserve(1.0, 0.1, 1)


def test_a_resumed_run_goes_on_counting_and_the_dataset_counts_only_what_was_done(path: Path) -> None:
    serve(path, steps=6, run="1")
    resumed = session(path, run="2", counted_steps=6, target=target(steps=9))
    with pytest.raises(BudgetExhausted, match="all the steps"):
        resumed.reserve(1.0, 0.1, 4)
    resumed.reserve(1.0, 0.1, 3)
    assert resumed.steps == 9
    assert resumed.epsilon() == compose([(1.0, 0.1, 9)], DELTA, "")
    assert total(path) == ((1.0, 0.1, 9),)
    for _ in range(3):
        resumed.take_step()
    resumed.commit()
    assert resumed.steps == 9


def test_the_server_cannot_lower_the_runs_count(path: Path) -> None:
    serve(path, steps=6)
    for claimed in (-5, 0, 3):
        ledger = session(path, counted_steps=claimed, target=target(steps=7))
        with pytest.raises(BudgetExhausted):
            ledger.check(1.0, 0.1, 2)


def test_a_commit_that_fails_leaves_the_reservation_counted_and_closed(path: Path) -> None:
    ledger = session(path)
    ledger.reserve(1.0, 0.1, 5)
    ledger.take_step()
    path.rename(path.with_name("away"))
    with pytest.raises(LedgerError, match="no such file"):
        ledger.commit()
    path.with_name("away").rename(path)
    with pytest.raises(BudgetExhausted):
        ledger.take_step()
    ledger.commit()
    assert total(path) == ((1.0, 0.1, 5),)


def test_a_ledger_swapped_in_between_gives_nothing_back(path: Path) -> None:
    ledger = session(path)
    ledger.reserve(1.0, 0.1, 5)
    path.unlink()
    create(path)
    with pytest.raises(LedgerError, match="not the ledger in which"):
        ledger.commit()
    older = session(path)
    older.reserve(1.0, 0.1, 2)
    path.unlink()
    create(path)
    session(path, run="2").reserve(1.0, 0.1, 9)  # the same number, another entry
    with pytest.raises(LedgerError, match="not the ledger in which"):
        older.commit()
    assert total(path) == ((1.0, 0.1, 9),)
