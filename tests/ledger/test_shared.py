"""Steps whose noise is shared: two sums of every dataset, attempts that are answered once, and entries that say so."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lalora_flwr.ground.errors import BudgetExhausted, LedgerError, SiteRefusal
from lalora_flwr.ledger.book import Book
from lalora_flwr.ledger.entries import EVALUATE, Commit, Genesis, Reserve, SharedReserve, from_json, to_json
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.ledger.sharing import Sharing, counted
from lalora_flwr.ledger.site_ledger import SiteLedger
from lalora_flwr.privacy.events import SampledGaussian
from tests.ledger.forgeries import check, edited, rehashed
from tests.ledger.site_ledgers import DELTA, compose, new_ledger, request, serve, session

Event = SampledGaussian


def sharing(**changed: Any) -> Sharing:
    return Sharing(**{"attempt": 1, "share": 1.0, "sites": 5, "colluders": 1, "roster": "r", "key": "k", **changed})


def shared_round(path: Path, sigma: float = 2.0, taken: int = 1, **changed: Any) -> None:
    about = {key: changed.pop(key) for key in ("attempt", "share", "sites", "colluders", "key") if key in changed}
    serve(path, sigma, steps=1, taken=taken, sharing=sharing(**about), **changed)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = new_ledger(tmp_path)
    serve(made, 3.0, steps=4, taken=2)
    shared_round(made)
    shared_round(made, server_round=2, attempt=2, share=1.1)
    shared_round(made, server_round=3, taken=0)
    serve(made, 3.0, steps=1)
    return made


def test_both_sums_are_those_of_the_entries(path: Path) -> None:
    book = LedgerFile(path).read().book
    assert book.segments("default") == (Event(2.0, 0.1, 2), Event(3.0, 0.1, 3))
    assert book.alone("default") == (Event(1.0, 0.1, 1), Event(1.1, 0.1, 1), Event(3.0, 0.1, 3))
    assert book.run_segments("default", "1") == book.segments("default")
    check(path)


def test_an_entry_holds_both_epsilons_and_survives_its_written_form(path: Path) -> None:
    first, second, third = (e for e in LedgerFile(path).read().entries if isinstance(e, SharedReserve))
    for entry in (first, second, third):
        assert from_json(to_json(entry)) == entry
        assert entry.epsilon == compose(entry.segments, DELTA, "") < entry.alone_epsilon == compose(entry.alone, DELTA, "")
    assert (second.round, second.attempt, second.share, second.key) == (2, 2, 1.1, "k")


FORGED: dict[str, tuple[int, dict[str, Any], str]] = {
    "a larger share": (3, {"share": 9.0}, "segments without the others' noise"),
    "a share that is not enough": (3, {"share": 0.5}, "do not make the noise"),
    "fewer sites": (3, {"sites": 2}, "do not make the noise"),
    "more colluders than sites": (3, {"colluders": 5}, "do not make the noise"),
    "colluders below none": (3, {"colluders": -1}, "do not make the noise"),
    "a smaller worst case": (3, {"alone_epsilon": 0.01}, "without the others' noise is 0.01"),
    "an attempt twice": (5, {"round": 1, "attempt": 1}, "repeats an attempt"),
    "other sums": (5, {"alone": (Event(9.0, 0.1, 1),)}, "segments without the others' noise"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_entry_is_found_though_every_hash_was_made_again(name: str, path: Path) -> None:
    number, values, said = FORGED[name]
    rehashed(path, edited(number, lambda entry: values))
    with pytest.raises(LedgerError, match=said):
        check(path)


def test_an_attempt_is_reserved_once_by_whichever_process_comes_first(path: Path) -> None:
    one, two = (session(path, server_round=4, sharing=sharing()) for _ in range(2))
    one.check(2.0, 0.1, 1)
    two.check(2.0, 0.1, 1)
    one.reserve(2.0, 0.1, 1)
    with pytest.raises(SiteRefusal, match="answered this attempt, or a later one, before"):
        two.reserve(2.0, 0.1, 1)
    for about, earlier in (({"server_round": 3}, 9), ({"server_round": 4}, 1), ({"server_round": 1}, 1)):
        with pytest.raises(SiteRefusal, match="before"):
            session(path, **about, sharing=sharing(attempt=earlier)).check(2.0, 0.1, 1)
    session(path, server_round=4, sharing=sharing(key="another site of this ledger")).check(2.0, 0.1, 1)
    session(path, run="2", sharing=sharing()).check(2.0, 0.1, 1)
    session(path, server_round=4, sharing=sharing(attempt=2)).check(2.0, 0.1, 1)


def test_an_attempt_that_was_never_sent_cannot_be_answered_later(path: Path) -> None:
    """Its step was given back, its masks were not: what is given back was perhaps on its way."""
    with pytest.raises(SiteRefusal, match="before"):
        shared_round(path, server_round=3)


def test_the_worst_case_has_a_budget_of_its_own(path: Path) -> None:
    spent = compose(LedgerFile(path).read().book.alone("default"), DELTA, "")
    about = request(server_round=5, sharing=sharing(share=2.0))
    for limit, fits in ((spent, False), (math.sqrt(spent**2 + 0.01), True)):
        ledger = SiteLedger(LedgerFile(path), about, 1e6, DELTA, compose, max_epsilon_alone=limit)
        ledger.identify("records of default")
        if fits:
            ledger.reserve(2.0, 0.1, 1)
        else:
            with pytest.raises(BudgetExhausted, match="if all other sites collude"):
                ledger.reserve(2.0, 0.1, 1)


def test_own_noise_and_answers_count_into_the_worst_case_too(path: Path) -> None:
    """Or a server would spend sums up to the owner's limit, and then go on without them."""
    spent = compose(LedgerFile(path).read().book.alone("default"), DELTA, "")
    for about in (request(server_round=9), request(server_round=9, schedule=EVALUATE)):
        ledger = SiteLedger(LedgerFile(path), about, 1e6, DELTA, compose, max_epsilon_alone=math.sqrt(spent**2 + 0.009))
        ledger.identify("records of default")
        with pytest.raises(BudgetExhausted, match="if all other sites collude"):
            ledger.reserve(1.0, 0.1, 1)
        ledger.reserve(2.0, 0.1, 1)
        spent = math.sqrt(spent**2 + 0.0025)


@given(st.floats(1e-6, 1e6))
def test_a_share_counts_rounded_down_to_a_few_digits(share: float) -> None:
    assert 0.99 * share < counted(share) <= share
    assert counted(counted(share)) == counted(share) == float(f"{counted(share):.2e}")


def test_a_server_that_varies_the_share_makes_no_long_sums(path: Path) -> None:
    for server_round in range(10, 40):
        shared_round(path, server_round=server_round, share=1.5 + server_round * 1e-9)
    assert len(LedgerFile(path).read().book.alone("default")) == 4
    check(path)


steps = st.tuples(
    st.sampled_from([1.0, 2.0]), st.sampled_from([0.1, 0.5]), st.sampled_from([0.0, 1.0, 1.5]), st.integers(1, 3), st.booleans()
)


@given(st.lists(steps, max_size=12))
def test_a_book_is_the_naive_sum_and_survives_its_state(rounds: list[tuple[float, float, float, int, bool]]) -> None:
    book, totals, alone = Book(), Counter[tuple[float, float]](), Counter[tuple[float, float]]()
    book.add(Genesis("2026-01-01T00:00:00+00:00", "l", 1))
    for number, (sigma, q, share, count, commits) in enumerate(rounds, 1):
        event = Event(sigma, q, count)
        common: dict[str, Any] = {
            **{"time": "2026-01-01T00:00:00+00:00", "run": "1", "strategy": "s", "round": number, "schedule": "both"},
            **{"dataset": "d", "fingerprint": "f", "sigma": sigma, "q": q, "clip_norm": 1.0, "steps": count},
            **{"run_epsilon": 1.0, "run_delta": 0.1, "run_steps": 99, "run_accountant": "pld", "max_epsilon": 9.0},
            **{"accountant": "pld", "delta": 0.1, "epsilon": 1.0, "segments": book.segments("d", plus=event)},
        }
        if share:
            own = book.alone("d", plus=event._replace(noise_multiplier=share))
            reserve: Reserve = SharedReserve(**common, **vars(sharing(share=share)), alone_epsilon=1.0, alone=own)
        else:
            reserve = Reserve(**common)
        at = book.add(reserve)
        taken = count - 1 if commits else count
        if commits:
            book.add(Commit("2026-01-01T00:00:00+00:00", at, taken))
        totals[sigma, q] += taken
        alone[share or sigma, q] += taken
        book = Book.from_state(json.loads(json.dumps(book.state())))
    for found, naive in ((book.segments("d"), totals), (book.alone("d"), alone)):
        assert found == tuple(Event(s, q, n) for (s, q), n in sorted(naive.items()) if n)
    newest = max((number for number, (_, _, share, _, _) in enumerate(rounds, 1) if share), default=0)
    for server_round in range(1, len(rounds) + 2):
        assert book.is_new("k", "1", server_round, 1) == ((server_round, 1) > (newest, 1 if newest else 0))
