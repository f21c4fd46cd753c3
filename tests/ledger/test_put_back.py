"""Edited, older and other ledgers are noticed by the checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from lalora_flwr.ground.errors import BudgetExhausted, LedgerError
from lalora_flwr.ledger.book import Book
from lalora_flwr.ledger.entries import Commit, Entry
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.ledger.site_ledger import SiteLedger
from lalora_flwr.ledger.state import store_checkpoint
from lalora_flwr.ledger.verify import verify
from lalora_flwr.privacy.events import SampledGaussian
from tests.ledger.checkpoints import all_entries, checkpoint, loaded, sums
from tests.ledger.site_ledgers import DELTA, compose, forge, request, serve, session, used_ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return used_ledger(tmp_path)


PUT_BACK = "changed or put back to an older copy"


Damage = Callable[[Path], None]


def edit_bytes(path: Path) -> None:
    content = path.read_bytes()
    place = content.index(b'"steps":4')
    path.write_bytes(content[: place + 8] + b"1" + content[place + 9 :])


def edit_by_sql(path: Path) -> None:
    forge(path, ("UPDATE entries SET body = replace(body, '\"steps\":4', '\"steps\":1') WHERE number = 1", []))


@pytest.mark.parametrize("edit", [edit_bytes, edit_by_sql])
def test_an_edit_of_an_old_entry_is_noticed_by_the_next_use(edit: Damage, path: Path) -> None:
    edit(path)
    for use in (session(path).check, session(path).reserve):
        with pytest.raises(LedgerError, match="entry 1: its hash does not fit"):
            use(1.0, 0.1, 2)


def test_an_edit_by_sql_is_noticed_even_if_something_was_appended_since(path: Path) -> None:
    older = checkpoint(path).read_bytes()
    serve(path)
    checkpoint(path).write_bytes(older)
    edit_by_sql(path)
    with pytest.raises(LedgerError, match="entry 1: its hash does not fit"):
        serve(path)


def test_an_edit_that_leaves_no_mark_on_the_file_is_found_by_verify_only(path: Path) -> None:
    edit_bytes(path)
    stat, state = path.stat(), loaded(path)
    state.mark = replace(state.mark, inode=stat.st_ino, size=stat.st_size, modified=stat.st_mtime_ns, changed=stat.st_ctime_ns)
    store_checkpoint(LedgerFile(path).cache, state)
    serve(path)  # the price of not reading everything
    with pytest.raises(LedgerError, match="entry 1: its hash does not fit"):
        verify(LedgerFile(path), compose=compose)


def test_the_checkpoints_own_entry_is_verified_at_each_use(path: Path) -> None:
    content = path.read_bytes()
    place = content.index(b'"reserve":4,"taken":3')
    path.write_bytes(content[: place + 20] + b"0" + content[place + 21 :])
    stat, state = path.stat(), loaded(path)
    state.mark = replace(state.mark, inode=stat.st_ino, size=stat.st_size, modified=stat.st_mtime_ns, changed=stat.st_ctime_ns)
    store_checkpoint(LedgerFile(path).cache, state)
    with pytest.raises(LedgerError, match=PUT_BACK):
        session(path).check(1.0, 0.1, 2)


def put_back_bytes(path: Path) -> None:
    old = path.read_bytes()
    serve(path)
    path.write_bytes(old)


def put_back_as_new_file(path: Path) -> None:
    shutil.copy2(path, path.with_name("backup"))
    serve(path)
    path.with_name("backup").replace(path)


def delete_by_sql(path: Path) -> None:
    forge(path, ("DELETE FROM entries WHERE number > 2", []))


def go_another_way(path: Path) -> None:
    old, cache = path.read_bytes(), LedgerFile(path).cache
    serve(path)
    kept = checkpoint(path).read_bytes()
    path.write_bytes(old)
    shutil.rmtree(cache)
    for _ in range(3):
        serve(path, 3.0)
    checkpoint(path).write_bytes(kept)


@pytest.mark.parametrize("put_back", [put_back_bytes, put_back_as_new_file, delete_by_sql, go_another_way])
def test_a_ledger_behind_its_checkpoint_is_refused(put_back: Damage, path: Path) -> None:
    put_back(path)
    for use in (session(path).check, session(path).reserve):
        with pytest.raises(LedgerError, match=PUT_BACK):
            use(1.0, 0.1, 2)
    verify(LedgerFile(path), compose=compose)  # which trusts no checkpoint
    shutil.rmtree(LedgerFile(path).cache)
    session(path).check(1.0, 0.1, 2)  # nothing else remembers


def test_a_ledger_put_back_while_a_site_uses_it_is_refused(path: Path) -> None:
    old, ledger = path.read_bytes(), session(path)
    ledger.reserve(1.0, 0.1, 2)
    path.write_bytes(old)
    with pytest.raises(LedgerError, match=PUT_BACK):
        ledger.commit()


def test_an_entry_is_made_again_if_another_process_was_faster_and_none_waits_for_it(path: Path) -> None:
    seen: list[int] = []

    def make(book: Book) -> Entry:
        seen.append(book.length)
        if len(seen) < 3:
            serve(path, busy=0.0)  # not locked, however long this takes
        return Commit("t", 3, 2)

    appended = LedgerFile(path).append(make)
    assert seen == [6, 8, 10]
    assert (appended.number, appended.hash) == (10, LedgerFile(path).read().head)
    assert sums(loaded(path).book) == all_entries(path)


def test_what_others_spent_meanwhile_counts(path: Path) -> None:
    room = compose([(2.0, 0.1, 2), (1.0, 0.1, 3 + 8)], DELTA, "")
    meanwhile = iter([lambda: serve(path, 1.0, steps=6)])

    def slow(history: Sequence[SampledGaussian], delta: float, accountant: str) -> float:
        next(meanwhile, lambda: None)()
        return compose(history, delta, accountant)

    ledger = SiteLedger(LedgerFile(path), request(), room, DELTA, slow)
    ledger.identify("records of default")
    with pytest.raises(BudgetExhausted, match=r"^budget: the site's records"):
        ledger.reserve(1.0, 0.1, 5)
    assert LedgerFile(path).read().book.segments("default") == ((1.0, 0.1, 9), (2.0, 0.1, 2))


def test_a_file_that_others_never_leave_alone_is_locked_after_the_documented_wait(path: Path) -> None:
    def make(book: Book) -> Entry:
        serve(path)
        return Commit("t", 3, 2)

    with pytest.raises(LedgerError, match=r"locked: others appended to it for 0\.1 seconds"):
        LedgerFile(path, 0.1).append(make)
    assert LedgerFile(path).read().book.state()["open"][0][0] == 3


def test_an_entry_that_does_not_fit_is_not_appended(path: Path) -> None:
    before, file = path.read_bytes(), LedgerFile(path)
    with pytest.raises(LedgerError, match="commits what is not reserved"):
        file.append(lambda _: Commit("t", 1, 0))
    assert path.read_bytes() == before
    file.append(lambda _: Commit("t", 3, 0))
    assert sums(file.state().book) == all_entries(path)
