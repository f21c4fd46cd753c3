"""A ledger's checkpoint: the same sums from it as from all entries, and damage costs time only."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lalora_flwr.ground.errors import LedgerError
from lalora_flwr.ledger.book import KEPT_HOURS, Book
from lalora_flwr.ledger.entries import EVALUATE, Commit, Entry, Genesis, Reserve
from lalora_flwr.ledger.file import READ_AGAIN, LedgerFile, create
from lalora_flwr.ledger.state import load_checkpoint, store_checkpoint
from lalora_flwr.ledger.verify import verify
from lalora_flwr.privacy.events import SampledGaussian
from tests.ledger.checkpoints import all_entries, checkpoint, loaded, sums
from tests.ledger.site_ledgers import DELTA, compose, serve, session, used_ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return used_ledger(tmp_path)


@st.composite
def histories(draw: st.DrawFn) -> list[Entry]:
    """Entries as sites write them: open and committed reservations of several datasets, runs, (σ, q), and evaluations."""
    entries: list[Entry] = [Genesis("2026-01-01T00:00:00+00:00", "x", 1)]
    book, waiting = Book(entries), dict[int, int]()
    for _ in range(draw(st.integers(0, 25))):
        if waiting and draw(st.booleans()):
            number = draw(st.sampled_from(sorted(waiting)))
            entries.append(Commit("t", number, draw(st.integers(0, waiting.pop(number)))))
        else:
            dataset, steps = draw(st.sampled_from("ab")), draw(st.integers(1, 5))
            sigma, q = draw(st.sampled_from([0.7, 1.0])), draw(st.sampled_from([0.1, 1.0]))
            waiting[len(entries)] = steps
            entries.append(
                Reserve(
                    time=f"2026-01-{draw(st.integers(1, 3)):02}T{draw(st.integers(0, 23)):02}:00:00+00:00",
                    run=draw(st.sampled_from("12")),
                    strategy="la-lora",
                    round=1,
                    schedule=draw(st.sampled_from(["step:BA", EVALUATE])),
                    dataset=dataset,
                    fingerprint=dataset + draw(st.sampled_from("xy")),
                    sigma=sigma,
                    q=q,
                    clip_norm=1.0,
                    steps=steps,
                    run_epsilon=draw(st.sampled_from([1.0, 2.0])),
                    run_delta=DELTA,
                    run_steps=9,
                    run_accountant="prv",
                    max_epsilon=9.0,
                    accountant="prv",
                    delta=DELTA,
                    epsilon=1.0,
                    segments=book.segments(dataset, plus=SampledGaussian(sigma, q, steps)),
                )
            )
        book.add(entries[-1])
    return entries


@given(entries=histories(), cut=st.integers(0, 25))
@settings(max_examples=200, deadline=None)
def test_a_book_that_was_written_down_anywhere_goes_on_as_if_it_had_not(entries: list[Entry], cut: int) -> None:
    whole, first = Book(entries), Book(entries[:cut])
    for entry in entries[cut:]:
        first = Book.from_state(json.loads(json.dumps(first.state())))
        first.add(entry)
    assert sums(first) == sums(whole)


def test_a_book_holds_no_more_for_more_rounds(path: Path) -> None:
    for _ in range(3):
        serve(path)
    before = len(checkpoint(path).read_text())
    for _ in range(20):
        serve(path)
    assert len(checkpoint(path).read_text()) <= before + 4  # counts have more digits


def test_hours_are_kept_by_entry_and_not_without_end(path: Path) -> None:
    (reserve,) = [e for e in LedgerFile(path).read().entries if isinstance(e, Reserve) and e.dataset == "b"]
    book = Book()
    for hour in range(KEPT_HOURS + 5):
        time = f"{2000 + hour // 600}-{1 + hour // 24 % 25 // 3:02}-{1 + hour // 24 % 3:02}T{hour % 24:02}:00:00+00:00"
        book.add(replace(reserve, time=time, segments=book.segments("b", plus=reserve.event)))
    ((_, _, _, hours, _),) = book.state()["datasets"].values()
    assert len(hours) <= KEPT_HOURS


def test_after_an_append_there_is_a_checkpoint_for_the_owner_only(path: Path) -> None:
    state = loaded(path)
    assert (state.head, state.last) == (LedgerFile(path).read().head, 5)
    assert sums(state.book) == all_entries(path)
    assert LedgerFile(path).cache.stat().st_mode & 0o777 == 0o700 and checkpoint(path).stat().st_mode & 0o777 == 0o600


def test_a_reader_leaves_one_if_it_had_much_to_read(path: Path) -> None:
    shutil.rmtree(LedgerFile(path).cache)
    LedgerFile(path).state()
    assert not LedgerFile(path).cache.exists()
    for _ in range(READ_AGAIN // 2):
        serve(path)
    shutil.rmtree(LedgerFile(path).cache)
    LedgerFile(path).state()
    assert sums(loaded(path).book) == all_entries(path)


def flipped(text: str, place: int) -> str:
    return text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :]


def test_no_damaged_byte_of_a_checkpoint_makes_a_wrong_sum(path: Path) -> None:
    good, right = checkpoint(path).read_text(), all_entries(path)
    for place in range(len(good)):
        checkpoint(path).write_text(flipped(good, place))
        assert load_checkpoint(LedgerFile(path).cache, path.stat().st_uid) is None
        if place % 20 == 0:
            assert sums(LedgerFile(path).state().book) == right
    serve(path)
    assert sums(loaded(path).book) == all_entries(path)


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff\xfe", b"cut", b"version"])
def test_what_is_no_checkpoint_is_read_over(content: bytes, path: Path) -> None:
    good = checkpoint(path).read_bytes()
    if content == b"version":
        state, right = loaded(path), all_entries(path)
        store_checkpoint(LedgerFile(path).cache, replace(state, book=Book()))  # nothing counted
        assert load_checkpoint(LedgerFile(path).cache, path.stat().st_uid) is None
    else:
        right = all_entries(path)
        checkpoint(path).write_bytes(good[: len(good) // 2] if content == b"cut" else content)
    assert sums(LedgerFile(path).state().book) == right
    serve(path)
    verify(LedgerFile(path), compose=compose)


def test_the_checkpoint_of_another_ledger_is_not_used(path: Path, tmp_path: Path) -> None:
    create(other := tmp_path / "other")
    serve(other, 0.5, steps=9)
    shutil.copytree(LedgerFile(other).cache, LedgerFile(path).cache, dirs_exist_ok=True)
    assert sums(LedgerFile(path).state().book) == all_entries(path)


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_checkpoint_where_others_may_write_is_not_used(mode: int, path: Path) -> None:
    state = loaded(path)
    state.book.add(Commit("t", 3, 0))  # a lie
    state.book.length -= 1
    store_checkpoint(LedgerFile(path).cache, state)
    assert sums(LedgerFile(path).state().book) != all_entries(path)  # whoever may write there is believed
    LedgerFile(path).cache.chmod(mode)
    assert sums(LedgerFile(path).state().book) == all_entries(path)


def test_a_lie_in_a_checkpoint_is_found_by_verify_once_it_was_written_on(path: Path) -> None:
    state = loaded(path)
    state.book.add(Commit("t", 3, 0))
    state.book.length -= 1
    store_checkpoint(LedgerFile(path).cache, state)
    serve(path)
    with pytest.raises(LedgerError, match="entry 6: its segments are not the sum"):
        verify(LedgerFile(path), compose=compose)


def test_a_cache_that_cannot_be_written_costs_time_only(path: Path) -> None:
    shutil.rmtree(LedgerFile(path).cache)
    LedgerFile(path).cache.write_text("in the way")
    serve(path)
    assert sums(LedgerFile(path).state().book) == all_entries(path)


def test_the_cache_may_be_deleted_at_any_time(path: Path) -> None:
    ledger = session(path)
    ledger.check(1.0, 0.1, 2)
    shutil.rmtree(LedgerFile(path).cache)
    ledger.reserve(1.0, 0.1, 2)
    shutil.rmtree(LedgerFile(path).cache)
    ledger.commit()
    assert sums(LedgerFile(path).state().book) == all_entries(path)


@pytest.mark.parametrize("appended", [0, 1, 5])
def test_a_process_killed_before_it_wrote_the_checkpoint_leaves_an_older_one(appended: int, path: Path) -> None:
    older = checkpoint(path).read_bytes()
    for _ in range(appended):
        serve(path)
    checkpoint(path).write_bytes(older)
    assert sums(LedgerFile(path).state().book) == all_entries(path)
    serve(path)
    assert sums(loaded(path).book) == all_entries(path)
