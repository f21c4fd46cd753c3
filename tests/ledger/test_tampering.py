"""Changes to a ledger's entries are found, up to those that only a noted head finds."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from lalora_flwr.ground.errors import LedgerError
from lalora_flwr.ledger.entries import (
    Commit,
    Entry,
    read_chain,
)
from lalora_flwr.ledger.file import LedgerFile, create
from tests.ledger.forgeries import Change, check, edited, rehashed
from tests.ledger.site_ledgers import forge, serve, used_ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return used_ledger(tmp_path)


Rows = list[tuple[int, str, str]]


def rows_of(path: Path) -> Rows:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT number, body, hash FROM entries ORDER BY number").fetchall()


def test_an_untouched_ledger_is_good(path: Path) -> None:
    check(path)
    assert len(rows_of(path)) == 6


def test_a_change_to_any_byte_of_any_entry_is_found(path: Path) -> None:
    rows = rows_of(path)
    list(read_chain(rows))
    for number, body, digest in rows:
        for place in range(len(body)):
            bad = body[:place] + chr(ord(body[place]) ^ 1) + body[place + 1 :]
            with pytest.raises(LedgerError, match=f"entry {number}: its hash does not fit"):
                list(read_chain([*rows[:number], (number, bad, digest), *rows[number + 1 :]]))
        for place in range(len(digest)):
            bad = digest[:place] + ("0" if digest[place] != "0" else "1") + digest[place + 1 :]
            with pytest.raises(LedgerError, match=f"entry {number}: its hash"):
                list(read_chain([*rows[:number], (number, body, bad), *rows[number + 1 :]]))


def test_a_changed_byte_in_the_file_is_found(path: Path) -> None:
    good = path.read_bytes()
    for _, body, digest in rows_of(path):
        for text in (body, digest):
            start = good.index(text.encode())
            for place in {start, start + len(text) // 2, start + len(text) - 1}:
                path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
                with pytest.raises(LedgerError):
                    check(path)
    path.write_bytes(good)
    check(path)


@pytest.mark.parametrize("place", ["first", "middle"])
def test_an_entry_taken_out_is_found(place: str, path: Path) -> None:
    forge(path, ("DELETE FROM entries WHERE number = ?", [0 if place == "first" else 3]))
    with pytest.raises(LedgerError, match="is missing"):
        check(path)


def test_an_entry_taken_out_and_the_rest_moved_up_is_found(path: Path) -> None:
    forge(
        path,
        ("DELETE FROM entries WHERE number = 3", []),
        *[("UPDATE entries SET number = ? WHERE number = ?", [n - 1, n]) for n in (4, 5)],
    )
    with pytest.raises(LedgerError, match="entry 3: its hash does not fit"):
        check(path)


def test_entries_that_changed_places_are_found(path: Path) -> None:
    rows = rows_of(path)
    swapped = [("UPDATE entries SET body = ?, hash = ? WHERE number = ?", [*rows[a][1:], b]) for a, b in ((1, 3), (3, 1))]
    forge(path, *swapped)
    with pytest.raises(LedgerError, match="entry 1: its hash does not fit"):
        check(path)


def test_a_body_of_another_kind_of_value_is_found(path: Path) -> None:
    forge(path, ("UPDATE entries SET body = CAST(body AS BLOB) WHERE number = 2", []))
    with pytest.raises(LedgerError, match="entry 2: its hash does not fit"):
        check(path)


def test_entries_of_another_ledger_do_not_fit(path: Path, tmp_path: Path) -> None:
    create(other := tmp_path / "other")
    for round_rows in rows_of(path)[1:]:
        forge(other, ("INSERT INTO entries VALUES (?, ?, ?)", round_rows))
    with pytest.raises(LedgerError, match="entry 1: its hash does not fit"):
        check(other)


def test_missing_last_entries_are_found_only_by_a_noted_head(path: Path) -> None:
    head = LedgerFile(path).read().head
    forge(path, ("DELETE FROM entries WHERE number > 2", []))
    check(path)
    with pytest.raises(LedgerError, match="the noted hash is not among its hashes"):
        check(path, head)


def test_an_old_copy_and_a_new_ledger_are_found_by_a_noted_head(path: Path) -> None:
    old = path.read_bytes()
    serve(path)
    head = LedgerFile(path).read().head
    check(path, head)
    serve(path)
    check(path, head)  # the ledger went on
    path.write_bytes(old)
    with pytest.raises(LedgerError, match="noted hash"):
        check(path, head)


def added(entry: Entry) -> Change:
    return lambda entries: entries.append(entry)


FORGERIES: dict[str, tuple[Change, str]] = {
    "less epsilon": (edited(4, lambda e: {"epsilon": e.epsilon / 2}), "entry 4: its epsilon is"),
    "fewer steps": (edited(4, lambda e: {"steps": 1}), "entry 4: its segments are not the sum"),
    "a segment less": (edited(3, lambda e: {"segments": e.segments[1:]}), "entry 3: its segments are not the sum"),
    "another cap": (edited(4, lambda e: {"max_epsilon": e.epsilon / 2}), "entry 4: .* is above the cap"),
    "given back twice": (added(Commit("t", 1, 0)), "entry 6: commits what is not reserved"),
    "more than reserved": (added(Commit("t", 3, 4)), "entry 6: commits more steps"),
    "fewer than none": (added(Commit("t", 3, -1)), "entry 6: commits more steps"),
    "records renamed": (edited(4, lambda e: {"fingerprint": "records of default"}), "entry 4: .* under another name"),
    "no noise": (edited(4, lambda e: {"sigma": 0.0}), "entry 4: reserves what are no noisy steps"),
    "a second beginning": (lambda entries: entries.append(entries[0]), "entry 6: not a ledger of this version"),
    "another accountant": (edited(4, lambda e: {"accountant": "gdp"}), "entry 4: unknown accountant gdp"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_with_good_hashes_is_found_if_it_does_not_add_up(name: str, path: Path) -> None:
    change, says = FORGERIES[name]
    rehashed(path, change)
    with pytest.raises(LedgerError, match=says):
        check(path)


def test_a_forgery_that_adds_up_is_found_only_by_a_noted_head(path: Path) -> None:
    head = LedgerFile(path).read().head
    rehashed(path, edited(4, lambda e: {"strategy": "rolora"}))
    check(path)
    with pytest.raises(LedgerError, match="noted hash"):
        check(path, head)
