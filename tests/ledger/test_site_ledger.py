"""A site's ledger against a naive one: whatever the order of calls, crashes and runs, nothing is forgotten."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from lalora_flwr.ground.errors import BudgetExhausted, ConfigError, LedgerError, SiteRefusal
from lalora_flwr.ledger.book import Book
from lalora_flwr.ledger.entries import EVALUATE, Reserve
from lalora_flwr.ledger.file import LedgerFile, create
from lalora_flwr.ledger.site_ledger import SiteLedger
from lalora_flwr.ledger.verify import verify
from lalora_flwr.methods.schedules import schedule_of
from lalora_flwr.privacy.accounting import HEADLINE, epsilon_spent
from lalora_flwr.privacy.events import SampledGaussian
from tests.ledger.site_ledgers import DELTA, compose, new_ledger, request, serve, session, target

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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return new_ledger(tmp_path)


def total(path: Path, dataset: str = "default") -> tuple[SampledGaussian, ...]:
    return LedgerFile(path).read().book.segments(dataset)


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
    with pytest.raises(RuntimeError, match="which records"):
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


def test_the_noise_is_known_again_only_for_the_same_target_and_rate(path: Path) -> None:
    assert session(path).known_noise(0.1) is None
    serve(path, 1.25, 0.1, 3)
    assert session(path, run="2", dataset="other").known_noise(0.1) == 1.25
    assert session(path).known_noise(0.2) is None
    for changed in ({"epsilon": 2.0}, {"delta": 1e-6}, {"steps": 5}, {"accountant": "rdp"}):
        assert session(path, target=target()._replace(**changed)).known_noise(0.1) is None


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


def test_the_noise_of_an_evaluation_is_never_that_of_training(path: Path) -> None:
    serve(path, 20.0, 1.0, 1, schedule=EVALUATE)
    assert session(path).known_noise(1.0) is None
    serve(path, 1.25, 1.0, 1)
    assert session(path).known_noise(1.0) == 1.25


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
