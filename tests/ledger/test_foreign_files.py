"""SQLite itself only appends; other files are no ledgers; entries have one written form."""

from __future__ import annotations

import math
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lalora_flwr.ground.errors import LedgerError
from lalora_flwr.ledger.book import Book
from lalora_flwr.ledger.entries import (
    Commit,
    from_json,
    to_json,
)
from lalora_flwr.ledger.file import LedgerFile, create
from lalora_flwr.ledger.site_ledger import SiteLedger
from lalora_flwr.ledger.verify import verify
from lalora_flwr.privacy.accounting import epsilon_spent
from tests.ledger.forgeries import check, edited, rehashed
from tests.ledger.site_ledgers import DELTA, compose, new_ledger, request, serve, used_ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return used_ledger(tmp_path)


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("UPDATE entries SET body = '' WHERE number = 1", "append-only"),
        ("DELETE FROM entries WHERE number = 5", "append-only"),
        ("INSERT OR REPLACE INTO entries VALUES (1, '', '')", "append-only"),
        ("INSERT INTO entries VALUES (9, '', '')", "append-only"),
        ("INSERT INTO entries VALUES (NULL, '', '')", "append-only"),
        ("DELETE FROM entries", "append-only"),
    ],
)
def test_sqlite_itself_only_appends(statement: str, says: str, path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, pytest.raises(sqlite3.IntegrityError, match=says):
        connection.execute(statement)


@pytest.mark.parametrize("statement", ["DROP TRIGGER no_delete", "CREATE TABLE more (x)", "CREATE INDEX i ON entries (hash)"])
def test_a_changed_schema_is_found(statement: str, path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(statement)
    with pytest.raises(LedgerError, match="schema was changed"):
        check(path)
    with pytest.raises(LedgerError, match="schema was changed"):
        serve(path)


@pytest.mark.parametrize("content", [b"", b"junk", b"\0" * 8192, None], ids=["empty", "junk", "zeros", "other database"])
def test_another_file_is_no_ledger(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if content is None:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE entries (number, body, hash)")
    else:
        path.write_bytes(content)
    for use in (lambda: LedgerFile(path).read(), lambda: serve(path), lambda: create(path)):
        with pytest.raises(LedgerError):
            use()
    if content is not None:
        assert path.read_bytes() == content


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
def test_a_file_cut_short_is_found(cut: float, path: Path) -> None:
    os.truncate(path, int(path.stat().st_size * cut))
    with pytest.raises(LedgerError):
        check(path)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        "null",
        '{"kind":"nothing"}',
        '{"kind":"commit","reserve":1,"taken":2}',
        '{"kind":"commit","reserve":1,"taken":2,"time":"t","more":1}',
        '{"kind":"commit","reserve":1,"taken":2.0,"time":"t"}',
        '{"kind":"commit","reserve":true,"taken":2,"time":"t"}',
        '{"kind":"commit", "reserve":1,"taken":2,"time":"t"}',
        '{"kind":"commit","taken":2,"reserve":1,"time":"t"}',
        '{"kind":"commit","reserve":1,"reserve":1,"taken":2,"time":"t"}',
        '{"kind":"commit","reserve":NaN,"taken":2,"time":"t"}',
        '{"kind":["commit"]}',
    ],
)
def test_only_the_canonical_form_is_an_entry(body: str) -> None:
    assert from_json('{"kind":"commit","reserve":1,"taken":2,"time":"t"}') == Commit("t", 1, 2)
    with pytest.raises(LedgerError):
        from_json(body)


def test_entries_survive_their_written_form(path: Path) -> None:
    entries = LedgerFile(path).read().entries
    assert [from_json(to_json(entry)) for entry in entries] == entries
    assert Book(entries).segments("default") == ((1.0, 0.1, 3), (2.0, 0.1, 2))


def test_verify_computes_epsilon_with_both_real_accountants(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    for sigma in (1.5, 2.0):
        ledger = SiteLedger(LedgerFile(path), request(), 8.0, DELTA)
        ledger.identify("x")
        ledger.reserve(sigma, 0.1, 30)
        ledger.commit()
    seen: list[tuple[int, int]] = []
    verified = verify(LedgerFile(path), progress=lambda *number: seen.append(number))
    entry, second = verified.last["default"]
    assert seen == [(1, 5), (3, 5)]
    assert entry.epsilon == epsilon_spent([(2.0, 0.1, 30)], DELTA)
    assert second == epsilon_spent([(2.0, 0.1, 30)], DELTA, "rdp")
    rehashed(path, edited(3, lambda e: {"epsilon": e.epsilon * 1.001}))
    with pytest.raises(LedgerError, match="entry 3: its epsilon is"):
        verify(LedgerFile(path))


@pytest.mark.parametrize("rdp", [0.0, 1.0, math.inf, math.nan])
def test_accountants_that_contradict_each_other_are_a_fault(rdp: float, path: Path) -> None:
    def apart(history: Any, delta: float, accountant: str) -> float:
        return rdp if accountant == "rdp" else compose(history, delta, accountant)

    if rdp == 1.0:
        verify(LedgerFile(path), compose=apart)
        return
    with pytest.raises(LedgerError, match="contradict each other"):
        verify(LedgerFile(path), compose=apart)
