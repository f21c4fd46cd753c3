"""``lalora ledger``: what an owner reads is what the file holds, and every fault is one line and a non-zero exit."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from lalora_flwr.cli import main as cli
from lalora_flwr.ledger.entries import hash_after, read_chain
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.ledger.site_ledger import SiteLedger
from lalora_flwr.privacy.accounting import epsilon_spent
from tests.cli.commands import without_waiting
from tests.ledger.site_ledgers import DELTA, forge, new_ledger, request

Outcome = tuple[int, str, str]
Lalora = Callable[..., Outcome]


@pytest.fixture
def lalora(capsys: pytest.CaptureFixture[str]) -> Lalora:
    """``lalora ledger …`` in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as ended:
            cli.main(["ledger", *map(str, arguments)])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, without_waiting(err)

    return call


def spend(path: Path, sigma: float, steps: int, taken: int | None, **changed: object) -> None:
    ledger = SiteLedger(LedgerFile(path), request(**changed), 8.0, DELTA)
    ledger.identify(str(changed.get("dataset", "x")))
    ledger.reserve(sigma, 0.1, steps)
    if taken is not None:
        for _ in range(taken):
            ledger.take_step()
        ledger.commit()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = new_ledger(tmp_path)
    spend(made, 2.0, 20, 20, run="11")
    spend(made, 2.0, 20, 5, run="11", server_round=2)
    spend(made, 2.5, 10, None, run="12", strategy="rolora", schedule="round:BA")
    spend(made, 3.0, 10, 10, run="13", dataset="ward [7]")
    return made


def test_create_makes_a_ledger_and_never_overwrites_one(lalora: Lalora, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    code, out, _ = lalora("create", path)
    assert code == 0 and f'ledger-path="{path}"' in out
    assert len(LedgerFile(path).read().entries) == 1
    before = path.read_bytes()
    code, out, err = lalora("create", path)
    assert (code, out) == (1, "") and err == f"lalora: {path}: there is a file already; a ledger is never overwritten\n"
    assert path.read_bytes() == before
    assert lalora("create", tmp_path / "no" / "folder")[0] == 1
    assert lalora("show", path)[1].splitlines()[1] == "nothing was spent"


def test_show_tells_epsilon_spent_and_left_by_dataset_run_and_round(lalora: Lalora, path: Path) -> None:
    code, out, _ = lalora("show", path, "--max-epsilon", 8, "--delta", 1e-4)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == f"8 entries, head {LedgerFile(path).read().head}"
    spent = epsilon_spent([(2.0, 0.1, 25), (2.5, 0.1, 10)], 1e-4)
    assert f"dataset default: epsilon {spent:.4f} spent at delta 0.0001 in 35 steps, {8 - spent:.4f} left of 8" in lines
    alone = f"{epsilon_spent([(2.0, 0.1, 25)], 1e-4):.4f}"
    assert ["11", "la-lora", "2", "25", alone] in [line.split() for line in lines]
    rows = [line for line in lines if "round:BA" in line or "step:BA" in line]
    assert len(rows) == 4 and "10 (not committed)" in rows[2]
    assert any(line.startswith("dataset ward [7]: ") for line in lines)


def test_show_takes_the_last_delta_unless_told(lalora: Lalora, path: Path) -> None:
    spent = epsilon_spent([(3.0, 0.1, 10)], DELTA)
    assert f"dataset ward [7]: epsilon {spent:.4f} spent at delta 1e-05 in 10 steps\n" in lalora("show", path)[1]


def test_verify_says_good_and_both_epsilons(lalora: Lalora, path: Path) -> None:
    head = LedgerFile(path).read().head
    code, out, _ = lalora("verify", path, "--head", head)
    assert code == 0 and out.startswith(f"good: 8 entries, head {head}\n")
    segments = [(3.0, 0.1, 10)]
    pld, rdp = epsilon_spent(segments, DELTA), epsilon_spent(segments, DELTA, "rdp")
    assert f"dataset ward [7]: epsilon {pld:.4f} at delta 1e-05 after its last reservation" in out
    assert f"(PLD; second accountant: {rdp:.4f})" in out


def test_verify_finds_a_change_and_a_missing_end(lalora: Lalora, path: Path) -> None:
    good, head = path.read_bytes(), LedgerFile(path).read().head
    forge(path, ("UPDATE entries SET body = replace(body, '\"steps\":20', '\"steps\":10') WHERE number = 1", []))
    for command in ("verify", "show", "export"):
        code, out, err = lalora(command, path)
        assert (code, out, err) == (1, "", f"lalora: {path}: entry 1: its hash does not fit; the ledger was changed\n")
    path.write_bytes(good)
    forge(path, ("DELETE FROM entries WHERE number > 5", []))
    assert lalora("verify", path)[0] == 0
    code, _, err = lalora("verify", path, "--head", head)
    assert code == 1 and err.count("\n") == 1 and "the noted hash is not among its hashes" in err


def test_export_is_enough_to_recompute_every_hash(lalora: Lalora, path: Path) -> None:
    code, out, _ = lalora("export", path)
    rows, previous = [], "0" * 64
    for line in out.splitlines():
        item = json.loads(line)
        body = json.dumps(item["entry"], sort_keys=True, separators=(",", ":"))
        previous = hash_after(previous, body)
        assert item["hash"] == previous
        rows.append((item["number"], body, previous))
    assert code == 0 and [entry for entry, _ in read_chain(rows)] == LedgerFile(path).read().entries


@pytest.mark.parametrize("command", ["show", "verify", "export"])
@pytest.mark.parametrize("content", [None, b"", b"no ledger", "database"])
def test_a_wrong_file_is_one_line(command: str, content: bytes | str | None, lalora: Lalora, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if content == "database":
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE t (x)")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    code, out, err = lalora(command, path)
    assert (code, out) == (1, "") and err.startswith(f"lalora: {path}: ") and err.count("\n") == 1
    assert lalora(command, tmp_path)[0] == 1  # a folder


@pytest.mark.parametrize("bad", [["--delta", 1], ["--delta", -1], ["--max-epsilon", 0], ["--max-epsilon", "nan"]])
def test_impossible_options_are_one_line(bad: list[object], lalora: Lalora, path: Path) -> None:
    code, out, err = lalora("show", path, *bad)
    assert (code, out) == (2, "") and err.startswith(f"lalora: {bad[0]} ") and err.count("\n") == 1


def test_reading_changes_nothing(lalora: Lalora, path: Path) -> None:
    shutil.rmtree(LedgerFile(path).cache)
    before = path.read_bytes()
    for command in ("show", "verify", "export"):
        assert lalora(command, path)[0] == 0
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["ledger"]


def test_witness_makes_the_file_that_a_ledger_in_use_lacks_and_verify_uses_it(lalora: Lalora, path: Path, tmp_path: Path) -> None:
    witness, content = tmp_path / "witness", LedgerFile(path).read()
    code, _, err = lalora("verify", path, "--witness", witness)
    assert code == 1 and f"`lalora ledger witness {path} --witness {witness}`" in err and err.count("\n") == 1
    code, out, _ = lalora("witness", path, "--witness", witness)
    assert code == 0 and f"ledger {content.ledger}: 8 entries, head {content.head}" in out
    assert f'witness-path="{witness}"' in out
    old = path.read_bytes()
    spend(path, 3.0, 10, 10, run="14", dataset="ward [7]")
    assert lalora("verify", path, "--witness", witness)[0] == 0
    assert lalora("witness", path, "--witness", witness)[0] == 0  # it catches up
    path.write_bytes(old)
    for command in ("verify", "witness"):
        code, out, err = lalora(command, path, "--witness", witness)
        assert code == 1 and out == "" and "put back to an older copy" in err and err.count("\n") == 1
