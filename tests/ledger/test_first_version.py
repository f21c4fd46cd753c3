"""A ledger written by the first version stays usable and verifiable.

`files/first_version.ledger` was made at commit 909e453 with that commit's code and the accountant of its time, PRV, by

    create(path)
    for number, (run, sigma, q, steps, taken, dataset) in enumerate(ROUNDS):
        ledger = SiteLedger(LedgerFile(path), request(run=run, server_round=number + 1, dataset=dataset, run_epsilon=8.0,
                                                      run_steps=1000, run_accountant="prv"), 8.0, DELTA)
        ledger.identify("records of " + dataset)
        ledger.reserve(sigma, q, steps)
        if taken is not None:
            for _ in range(taken):
                ledger.take_step()
            ledger.commit()

with `request` and `DELTA` from `site_ledgers.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.ledger.verify import verify
from tests.ledger.site_ledgers import serve, session, target

MADE = Path(__file__).with_name("files") / "first_version.ledger"
HEAD = "eaa5ba3df7858cb926637222e6f669eec4163c3ad9b1be3d5d357a98c8c85382"
ROUNDS = [
    ("1", 2.0, 0.1, 20, 20, "default"),
    ("1", 2.0, 0.1, 20, 5, "default"),
    ("2", 2.5, 0.05, 10, None, "default"),
    ("2", 2.5, 0.05, 10, 10, "default"),
    ("3", 3.0, 0.2, 10, 0, "ward 7"),
    ("3", 3.0, 0.2, 10, 10, "ward 7"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return Path(shutil.copy(MADE, tmp_path / "ledger"))


def test_it_verifies_with_both_real_accountants(path: Path) -> None:
    verified = verify(LedgerFile(path), HEAD)
    entry, second = verified.last["default"]
    assert (entry.accountant, round(entry.epsilon, 4)) == ("prv", 1.2530) and second > entry.epsilon
    assert verified.content.head == HEAD and len(verified.content.entries) == 12


def test_its_sums_are_those_of_its_rounds(path: Path) -> None:
    for book in (LedgerFile(path).read().book, LedgerFile(path).state().book):
        assert book.datasets == ["default", "ward 7"]
        assert book.segments("default") == ((2.0, 0.1, 25), (2.5, 0.05, 20))
        assert book.segments("ward 7") == ((3.0, 0.2, 10),)
        assert book.run_segments("default", "2") == ((2.5, 0.05, 20),)


def test_a_site_goes_on_with_it(path: Path, tmp_path: Path) -> None:
    asked = {"run": "1", "target": target(8.0, 1000, "prv")}
    LedgerFile(path, witness=tmp_path / "witness").make_witness()
    serve(path, 2.0, 0.1, 5, witness=tmp_path / "witness", **asked)
    assert session(path, **asked).steps == 30
    assert LedgerFile(path).read().hashes[11] == HEAD
