"""A ledger that is not what its witness saw, or a continuation of it, is refused; no crash makes a good one look like that."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lalora_flwr.ground.errors import BudgetExhausted, LedgerError
from lalora_flwr.ledger.file import LedgerFile, create
from lalora_flwr.ledger.verify import verify
from lalora_flwr.ledger.witness import Sighting, Witness
from tests.ledger.site_ledgers import compose, forge, serve, session


@pytest.fixture
def witness(tmp_path: Path) -> Path:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    return elsewhere / "witness"


def seen(witness: Path) -> Sighting:
    found = Witness(witness).read()
    assert found is not None
    return found


def refuses(path: Path, witness: Path, says: str) -> None:
    """Every use says so, and nothing is appended."""
    before = path.read_bytes()
    ledger = session(path, witness=witness)
    for use in (ledger.check, ledger.reserve):
        with pytest.raises(LedgerError, match=says):
            use(1.0, 0.1, 2)
    with pytest.raises(LedgerError, match=says):
        ledger.spent()
    with pytest.raises(LedgerError, match=says):
        verify(LedgerFile(path, witness=witness), compose=compose)
    assert path.read_bytes() == before


def test_it_sees_a_reservation_before_a_step_is_taken_and_its_commit(path: Path, witness: Path) -> None:
    ledger = session(path, witness=witness)
    ledger.check(1.0, 0.1, 2)
    assert not witness.exists()
    ledger.reserve(1.0, 0.1, 2)
    content = LedgerFile(path).read()
    assert (seen(witness).ledger, seen(witness).entries, seen(witness).head) == (content.ledger, 2, content.head)
    ledger.take_step()
    ledger.commit()
    assert (seen(witness).entries, seen(witness).head) == (3, LedgerFile(path).read().head)
    assert witness.stat().st_mode & 0o777 == 0o600 and len(list(witness.parent.iterdir())) == 1
    verify(LedgerFile(path, witness=witness), compose=compose)


PutBack = Callable[[Path], None]


def older_copy(path: Path) -> None:
    old = path.read_bytes()
    serve(path)
    serve(path, witness=path.with_name("elsewhere") / "witness")
    path.write_bytes(old)


def deleted_end(path: Path) -> None:
    forge(path, ("DELETE FROM entries WHERE number > 2", []))


def another_way(path: Path) -> None:
    old = path.read_bytes()
    serve(path, witness=path.with_name("elsewhere") / "witness")
    path.write_bytes(old)
    shutil.rmtree(LedgerFile(path).cache)
    for _ in range(3):
        serve(path, 9.0)


@pytest.mark.parametrize("put_back", [older_copy, deleted_end, another_way])
def test_a_ledger_put_back_is_refused_even_without_its_checkpoint(put_back: PutBack, path: Path, witness: Path) -> None:
    for _ in range(3):
        serve(path, witness=witness)
    put_back(path)
    shutil.rmtree(LedgerFile(path).cache)
    refuses(path, witness, "saw [0-9]+ entries at .*, which are not there; the file was changed or put back")
    session(path).check(1.0, 0.1, 2)  # nothing but the witness knows


def test_a_ledger_put_back_while_a_site_uses_it_gives_nothing_back(path: Path, witness: Path) -> None:
    serve(path, witness=witness)
    old, ledger = path.read_bytes(), session(path, witness=witness)
    ledger.reserve(1.0, 0.1, 2)
    path.write_bytes(old)
    with pytest.raises(LedgerError, match="put back"):
        ledger.commit()


@pytest.mark.parametrize("entries", [1, 2], ids=["between append and witness", "twice"])
def test_a_process_killed_before_the_witness_was_written_stops_nobody(entries: int, path: Path, witness: Path) -> None:
    serve(path, witness=witness)
    older = witness.read_bytes()
    session(path, witness=witness).reserve(1.0, 0.1, 2)
    if entries == 2:
        session(path, witness=witness).reserve(1.0, 0.1, 2)
    witness.write_bytes(older)
    serve(path, witness=witness)
    assert seen(witness).entries == 3 + entries + 2


def test_a_missing_witness_is_refused_with_the_command_that_makes_it(path: Path, witness: Path) -> None:
    serve(path, witness=witness)
    witness.unlink()
    refuses(path, witness, f"`lalora ledger witness {path} --witness {witness}`")
    assert not witness.exists()
    LedgerFile(path, witness=witness).make_witness()
    assert seen(witness).entries == 3
    serve(path, witness=witness)


def test_a_ledger_that_was_used_before_needs_its_witness_made(path: Path, witness: Path) -> None:
    serve(path)
    refuses(path, witness, "is missing")


def test_two_ledgers_cannot_share_a_witness(path: Path, witness: Path, tmp_path: Path) -> None:
    serve(path, witness=witness)
    create(other := tmp_path / "other")
    for _ in range(2):
        refuses(other, witness, "is that of another ledger")
        serve(other)
    before = witness.read_bytes()
    for refused in (LedgerFile(other, witness=witness).make_witness, lambda: Witness(witness).write("other", 99, "h")):
        with pytest.raises(LedgerError, match="another ledger"):
            refused()
    assert witness.read_bytes() == before


def test_a_new_ledger_in_the_place_of_a_lost_one_is_refused(path: Path, witness: Path) -> None:
    serve(path, witness=witness)
    path.unlink()
    create(path)
    refuses(path, witness, "is that of another ledger")


def test_no_changed_byte_of_a_witness_lets_an_older_copy_pass(path: Path, witness: Path) -> None:
    serve(path, witness=witness)
    old = path.read_bytes()
    serve(path, witness=witness)
    path.write_bytes(old)
    shutil.rmtree(LedgerFile(path).cache)
    good = witness.read_bytes()
    for place in range(len(good)):
        for bit in (1, 4):
            witness.write_bytes(good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :])
            with pytest.raises(LedgerError):
                session(path, witness=witness).check(1.0, 0.1, 2)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "null", '{"ledger": "x", "entries": true, "head": "h", "time": "t"}\n', "\xff"]
)
def test_what_is_no_witness_is_neither_believed_nor_overwritten(content: str, path: Path, witness: Path) -> None:
    witness.write_text(content, encoding="latin-1")
    refuses(path, witness, "is damaged or no witness")
    with pytest.raises(LedgerError, match="no witness"):
        LedgerFile(path, witness=witness).make_witness()
    assert witness.read_text(encoding="latin-1") == content


def test_the_ledger_itself_is_no_witness(path: Path) -> None:
    refuses(path, path, "is damaged or no witness")


def test_where_no_witness_can_be_written_nothing_is_counted(path: Path, tmp_path: Path) -> None:
    missing = tmp_path / "not mounted" / "witness"
    before = path.read_bytes()
    for use in (session(path, witness=missing).check, session(path, witness=missing).reserve):
        with pytest.raises(LedgerError, match=f"its witness {missing} cannot be written"):
            use(1.0, 0.1, 2)
    assert path.read_bytes() == before


def in_the_way(witness: Path) -> Path:
    """What keeps this process from writing the witness, though its folder may be written to."""
    return witness.with_name(f".{witness.name}.{os.getpid()}.part")


def test_a_witness_that_fails_after_the_append_means_no_step_and_everything_counts(path: Path, witness: Path) -> None:
    LedgerFile(path, witness=witness).make_witness()
    in_the_way(witness).mkdir()
    ledger = session(path, witness=witness)
    with pytest.raises(LedgerError, match="cannot be written: Is a directory"):
        ledger.reserve(1.0, 0.1, 2)
    with pytest.raises(BudgetExhausted, match="no reserved step"):
        ledger.take_step()
    assert LedgerFile(path).read().book.segments("default") == ((1.0, 0.1, 2),)
    in_the_way(witness).rmdir()
    serve(path, witness=witness)
    assert seen(witness).entries == 4


def test_the_first_witness_is_there_before_the_first_entry(path: Path, witness: Path) -> None:
    """Else a process killed at that moment would leave a ledger in use whose witness is missing."""
    in_the_way(witness).mkdir()
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="cannot be written: Is a directory"):
        session(path, witness=witness).reserve(1.0, 0.1, 2)
    assert path.read_bytes() == before


def test_what_it_remembers_never_gets_older(path: Path, witness: Path) -> None:
    serve(path, witness=witness)
    before = witness.read_bytes()
    Witness(witness).write(seen(witness).ledger, 2, "an older head")
    assert witness.read_bytes() == before


def test_a_process_that_has_no_witness_goes_on_and_the_next_that_has_one_catches_up(path: Path, witness: Path) -> None:
    serve(path, witness=witness)
    for _ in range(3):
        serve(path)
    serve(path, witness=witness)
    assert (seen(witness).entries, seen(witness).head) == (11, LedgerFile(path).read().head)
