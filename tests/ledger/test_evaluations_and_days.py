"""Evaluations, queries of a day, and what the owner's log tells."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lalora_flwr.ground.errors import BudgetExhausted, ConfigError, SiteRefusal
from lalora_flwr.ledger.book import Book
from lalora_flwr.ledger.entries import EVALUATE, Reserve
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.ledger.verify import verify
from lalora_flwr.methods.schedules import schedule_of
from lalora_flwr.privacy.events import SampledGaussian
from tests.ledger.site_ledgers import DELTA, compose, serve, session, target
from tests.ledger.sums import total


def test_an_evaluation_counts_for_the_dataset_and_not_for_the_run(path: Path) -> None:
    serve(path, 1.25, 1.0, 3, taken=3)
    evaluation: dict[str, Any] = {"schedule": EVALUATE, "target": target(1e-9, 3), "clip_norm": 1.0}
    ledger = session(path, **evaluation)
    ledger.check(20.0, 1.0, 1)
    ledger.reserve(20.0, 1.0, 1)
    ledger.take_step()
    with pytest.raises(BudgetExhausted, match="no reserved step"):
        ledger.take_step()
    ledger.commit()
    assert total(path) == ((1.25, 1.0, 3), (20.0, 1.0, 1))
    assert ledger.steps == session(path).steps == 3
    assert session(path).epsilon() == compose([(1.25, 1.0, 3)], DELTA, "")
    assert session(path).spent() == compose(total(path), DELTA, "")
    entry = LedgerFile(path).read().entries[3]
    assert isinstance(entry, Reserve) and (entry.schedule, entry.strategy, entry.steps) == ("evaluate", "la-lora", 1)
    verify(LedgerFile(path), compose=compose)


def test_an_evaluation_is_held_to_the_owners_budget(path: Path) -> None:
    room = compose([(20.0, 1.0, 2)], DELTA, "")
    for _ in range(2):
        serve(path, 20.0, 1.0, 1, max_epsilon=room, schedule=EVALUATE)
    for refused in (session(path, room, schedule=EVALUATE).check, session(path, room).check):
        with pytest.raises(BudgetExhausted, match="no epsilon left"):
            refused(20.0, 1.0, 1)


def test_what_an_evaluation_did_not_take_is_given_back_and_a_crash_counts_it(path: Path) -> None:
    serve(path, 20.0, 1.0, 1, taken=0, schedule=EVALUATE)
    assert total(path) == ()
    session(path, schedule=EVALUATE).reserve(20.0, 1.0, 1)
    assert total(path) == ((20.0, 1.0, 1),)


def test_no_training_order_can_call_itself_an_evaluation() -> None:
    with pytest.raises(ConfigError):
        schedule_of(EVALUATE)


NOON = datetime(2026, 3, 10, 12, tzinfo=UTC)


TOO_MANY = "^cap: the site has answered as many queries today as max-queries-per-day allows$"


def asked(path: Path, at: datetime, queries: float = 3, **changed: Any) -> None:
    serve(path, queries=queries, at=at, **changed)


def test_a_day_has_so_many_queries_whoever_asks_and_for_what(path: Path) -> None:
    asked(path, NOON)
    asked(path, NOON, run="2")
    asked(path, NOON + timedelta(hours=1), schedule=EVALUATE)
    assert session(path, at=NOON + timedelta(hours=1)).queries_today() == 3
    for use in ("check", "reserve"):
        with pytest.raises(SiteRefusal, match=TOO_MANY) as refusal:
            getattr(session(path, queries=3, at=NOON + timedelta(hours=23), run="3"), use)(1.0, 0.1, 1)
        assert not isinstance(refusal.value, BudgetExhausted)
    asked(path, NOON, dataset="another")
    asked(path, NOON + timedelta(hours=25))
    asked(path, NOON + timedelta(hours=25))
    with pytest.raises(SiteRefusal, match=TOO_MANY):
        asked(path, NOON + timedelta(hours=25))


@pytest.mark.parametrize("back", [timedelta(hours=2), timedelta(days=1), timedelta(days=900)])
def test_setting_the_clock_back_opens_no_new_day(back: timedelta, path: Path) -> None:
    for _ in range(3):
        asked(path, NOON)
    with pytest.raises(SiteRefusal, match=TOO_MANY):
        asked(path, NOON - back)


def test_setting_the_clock_ahead_and_back_forgets_nothing(path: Path) -> None:
    for _ in range(2):
        asked(path, NOON)
    asked(path, NOON + timedelta(days=900))
    with pytest.raises(SiteRefusal, match=TOO_MANY):
        asked(path, NOON)


@given(
    times=st.lists(st.integers(-40, 40), max_size=30),
    now=st.integers(-60, 60),
)
def test_queries_of_the_last_24_hours_are_never_too_few(times: list[int], now: int) -> None:
    """Against counting every entry: never fewer than were made in 24 hours, never more than in 25; later ones count."""
    book = Book()
    for hours in times:
        entry = Reserve(
            time=(NOON + timedelta(hours=hours / 3)).isoformat(timespec="seconds"),
            **{**dict.fromkeys(("run", "strategy", "schedule", "fingerprint", "run_accountant", "accountant"), "x"), "round": 1},
            **{
                **dict.fromkeys(("clip_norm", "run_epsilon", "run_delta", "max_epsilon", "delta", "epsilon"), 1.0),
                "run_steps": 1,
            },
            **{
                "dataset": "d",
                "sigma": 1.0,
                "q": 0.1,
                "steps": 1,
                "segments": book.segments("d", plus=SampledGaussian(1.0, 0.1, 1)),
            },
        )
        book.add(entry)
    found = book.recent("d", NOON + timedelta(hours=now / 3))
    assert sum(hours / 3 > now / 3 - 24 for hours in times) <= found <= sum(hours / 3 > now / 3 - 25 for hours in times)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", logger="lalora_flwr.site")
    return caplog


def test_the_log_notes_head_and_length_at_each_append(path: Path, log: pytest.LogCaptureFixture) -> None:
    serve(path, steps=3, taken=2)
    content = LedgerFile(path).read()
    reserved, took = (record.getMessage() for record in log.records)
    for line, entries in ((reserved, 2), (took, 3)):
        assert f"ledger {content.ledger} had {entries} entries at 20" in line and line.endswith(content.hashes[entries - 1])
    assert "took 2 of 3 reserved steps" in took


def test_changed_records_under_an_old_name_are_said_once(path: Path, log: pytest.LogCaptureFixture) -> None:
    for day, fingerprint in enumerate(["x", "x", "y", "y", "x"]):
        serve(path, dataset="ward 7", fingerprint=fingerprint, at=NOON + timedelta(days=day))
    warnings = [record.getMessage() for record in log.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    assert warnings[0].startswith("dataset ward 7: its records have changed")
    assert "2026-03-11T12:00:00+00:00, in use since 2026-03-10T12:00:00+00:00" in warnings[0]
    assert "2026-03-13T12:00:00+00:00, in use since 2026-03-12T12:00:00+00:00" in warnings[1]
