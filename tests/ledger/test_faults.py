"""Processes that are killed, race, or meet a disk that is full, read-only or taken: counted is never less than released."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lalora_flwr.ground.errors import LedgerError
from lalora_flwr.ledger.entries import Commit, Reserve
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.ledger.verify import verify
from lalora_flwr.ledger.witness import Witness
from tests.ledger.site_ledgers import DELTA, compose, new_ledger, serve, session

KILLS = 40
Q = 0.1

# Serves rounds until it is killed; a line in the file of releases follows each step that the ledger allowed.
SERVES = """
import os, random, sys
from pathlib import Path
from tests.ledger.site_ledgers import session
path, releases, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
draw, out = random.Random(seed), os.open(releases, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
print("go", flush=True)
while True:
    ledger = session(path, run=str(seed), witness=path.with_name("witness"))
    sigma, steps = draw.choice((0.7, 1.0, 2.0)), draw.randint(1, 5)
    ledger.reserve(sigma, 0.1, steps)
    for _ in range(steps if draw.random() < 0.7 else draw.randint(0, steps)):
        ledger.take_step()
        os.write(out, f"{sigma}\\n".encode())
    if draw.random() < 0.9:
        ledger.commit()
"""

# Takes what the budget gives, step by step, from the moment it is told to start.
RACES = """
import sys
from pathlib import Path
from lalora_flwr.ground.errors import BudgetExhausted
from tests.ledger.site_ledgers import session
path, room, name = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
taken = 0
print("ready", flush=True)
sys.stdin.readline()
try:
    while True:
        ledger = session(path, room, run=name, busy=60, witness=path.with_name("witness"))
        ledger.reserve(1.0, 0.1, 1)
        ledger.take_step()
        taken += 1
        ledger.commit()
except BudgetExhausted:
    print(taken)
"""

# Reserves under a limit on the size of files, as on a full disk, until it cannot.
FILLS = """
import resource, sys
from pathlib import Path
from lalora_flwr.ground.errors import LedgerError
from tests.ledger.site_ledgers import session
path, limit = Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
reserved = 0
try:
    while True:
        session(path).reserve(1.0, 0.1, 2)
        reserved += 2
except LedgerError as error:
    print(reserved, error)
"""

# Tries to serve as a user who may only read.
READS = """
import os, sys
from pathlib import Path
from lalora_flwr.ground.errors import LedgerError
from tests.ledger.site_ledgers import session
path = Path(sys.argv[1])
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
for use in (session(path).check, session(path).reserve):
    try:
        use(1.0, 0.1, 2)
    except LedgerError as error:
        print(error)
"""


def child(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def counted(path: Path) -> Counter[float]:
    """Steps by σ, from a ledger without a fault."""
    return Counter({sigma: n for sigma, _, n in verify(LedgerFile(path), compose=compose).content.book.segments("default")})


@pytest.mark.faults
def test_killed_at_any_moment_it_never_counts_less_than_was_released(path: Path, tmp_path: Path) -> None:
    draw, releases, half_written, cut, unwitnessed = random.Random(5), tmp_path / "releases", 0, 0, 0
    witness = tmp_path / "witness"
    for kill in range(KILLS):
        with child(SERVES, path, releases, kill) as process:
            assert process.stdout is not None and process.stdout.readline() == "go\n"
            time.sleep(draw.uniform(0, 0.3))
            process.kill()
        assert process.returncode == -signal.SIGKILL
        half_written += Path(f"{path}-journal").exists()
        released = Counter(float(line) for line in releases.read_text().split()) if releases.exists() else Counter()
        held = counted(path)
        assert all(held[sigma] >= steps for sigma, steps in released.items()), kill
        assert compose([(s, Q, n) for s, n in held.items()], DELTA, "") >= compose(
            [(s, Q, n) for s, n in released.items()], DELTA, ""
        )
        content, seen = LedgerFile(path).read(), Witness(witness).read()
        cut += isinstance(content.entries[-1], Reserve)
        behind = len(content.entries) - seen.entries if seen else len(content.entries) - 1
        unwitnessed += behind
        assert behind in (0, 1) and (seen is None or content.hashes[seen.entries - 1] == seen.head)
        assert LedgerFile(path).state().book.state() == content.book.state()
        serve(path, 1.0, Q, 1, taken=0, witness=witness)  # the next process goes on
    assert released.total() > KILLS
    assert cut, "no kill hit an open reservation"
    entries = LedgerFile(path).read().entries
    assert held.total() <= sum(entry.steps for entry in entries if isinstance(entry, Reserve))
    print(f"{KILLS} kills, {half_written} in a write, {cut} in a reservation, {unwitnessed} before the witness")


def test_two_processes_never_spend_the_same_epsilon(path: Path) -> None:
    room = compose([(1.0, Q, 40)], DELTA, "")
    racers = [child(RACES, path, room, name) for name in "ab"]
    for racer in racers:
        assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
    taken = [int(racer.communicate("start\n", timeout=120)[0]) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert sum(taken) == 40
    assert counted(path) == {1.0: 40}
    seen, content = Witness(path.with_name("witness")).read(), LedgerFile(path).read()
    assert seen is not None and (seen.entries, seen.head) == (len(content.entries), content.head)
    assert {entry.max_epsilon for entry in LedgerFile(path).read().entries if isinstance(entry, Reserve)} == {room}


@pytest.mark.parametrize("spare", [0, 100, 4096, 20000])
def test_on_a_full_disk_nothing_is_taken_and_nothing_breaks(spare: int, path: Path) -> None:
    for _ in range(5):
        serve(path)
    before = counted(path)
    with child(FILLS, path, path.stat().st_size + spare) as process:
        answer = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    reserved, _, error = answer.partition(" ")
    assert error.startswith(f"{path}: ")
    assert counted(path) == before + Counter({1.0: int(reserved)})
    serve(path)  # there is room again


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="lalora-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("mode", [0o444, 0o000])
def test_a_ledger_that_cannot_be_written_stops_a_site_before_and_at_reserve(mode: int, open_folder: Path) -> None:
    path = new_ledger(open_folder)
    path.chmod(mode)
    before = path.read_bytes() if os.getuid() == 0 else None
    if os.getuid() != 0:
        open_folder.chmod(0o555)
    answer = subprocess.run([sys.executable, "-c", READS, str(path)], capture_output=True, text=True, timeout=60)
    open_folder.chmod(0o755)
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert len(lines) == 2 and all(line.startswith(f"{path}: ") for line in lines)
    assert before is None or path.read_bytes() == before


def test_a_locked_ledger_stops_a_site_after_its_patience(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        begun = time.monotonic()
        for use in (session(path, busy=0.1).check, session(path, busy=0.1).reserve):
            with pytest.raises(LedgerError, match="locked"):
                use(1.0, Q, 2)
        assert time.monotonic() - begun < 5
        other.execute("ROLLBACK")
    assert counted(path) == {}
    serve(path)


def test_a_site_waits_for_one_that_is_done_soon(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with child(SERVES, path, path.with_name("releases"), 0) as process:
            assert process.stdout is not None and process.stdout.readline() == "go\n"
            time.sleep(0.3)
            assert process.poll() is None
            other.execute("ROLLBACK")
            deadline = time.monotonic() + 20
            while not path.with_name("releases").exists() or not path.with_name("releases").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.kill()


def test_a_half_written_transaction_is_rolled_back_by_the_next_process(path: Path) -> None:
    """A process dies after it changed the file itself, with its rollback journal beside it."""
    serve(path)
    good = path.read_bytes()
    script = """
import os, signal, sqlite3, sys
c = sqlite3.connect(sys.argv[1], isolation_level=None)
c.execute("PRAGMA cache_size = 1")
c.execute("BEGIN IMMEDIATE")
for n in range(3, 400):
    c.execute("INSERT INTO entries VALUES (?, ?, 'x')", (n, "y" * 500))
os.kill(os.getpid(), signal.SIGKILL)
"""
    with child(script, path) as process:
        process.communicate(timeout=60)
    assert path.read_bytes() != good and path.with_name("ledger-journal").exists()
    assert counted(path) == {1.0: 3}
    assert path.read_bytes() == good and not path.with_name("ledger-journal").exists()


def test_creation_under_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    script = """
import resource, sys
from lalora_flwr.ground.errors import LedgerError
from lalora_flwr.ledger.file import create
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    create(sys.argv[1])
except LedgerError as error:
    print(error)
"""
    with child(script, tmp_path / "ledger") as process:
        answer = process.communicate(timeout=60)[0]
    assert answer.startswith(f"{tmp_path / 'ledger'}: ")
    assert list(tmp_path.iterdir()) == []


def test_only_its_owner_can_read_a_new_ledger(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_last_entry_of_a_finished_round_is_its_commit(path: Path) -> None:
    serve(path, steps=3, taken=2)
    assert LedgerFile(path).read().entries[-1] == Commit(LedgerFile(path).read().entries[-1].time, 1, 2)
