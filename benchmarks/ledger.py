"""What a message costs a site's ledger after 10, 1,000 and 10,000 rounds, with one (σ, q) and with 100 of them.

    python -m benchmarks.ledger [--rounds 10 1000 10000] [--folder FOLDER]

Each number is CPU milliseconds of one whole message (known noise, check, reserve, two steps, commit, the run's ε) in a
process that was started for it, after its imports. "ledger": with an ε that costs nothing, the median of five. "with ε":
with the accountant, whose folder of composed histories earlier messages filled, for a σ and q that the ledger knows, and
for ones it has never seen. "no checkpoint": once everything has to be read. "runs": every round is a run of its own.
"""

from __future__ import annotations

import argparse
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from lalora_flwr.ledger.book import Book
from lalora_flwr.ledger.entries import Commit, Entry, Reserve, clock, hash_after, to_json, written
from lalora_flwr.ledger.file import LedgerFile, create
from lalora_flwr.privacy.accounting import HEADLINE

DELTA, Q, STEPS = 1e-6, 0.01, 2
PAIRS = 100

MESSAGE = """
import math, sys, time
from lalora_flwr.privacy.accounting import HEADLINE
from lalora_flwr.privacy.events import Target
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.ledger.site_ledger import Request, SiteLedger
path, sigma, q, cheap = sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), sys.argv[4] == "cheap"
begun = time.process_time()
request = Request("1", "la-lora", 1, "step:BA", "default", 1.0, Target(1e6, 1e-6, 10**9, HEADLINE))
compose = (lambda history, delta, accountant: math.sqrt(sum(n * (q / s) ** 2 for s, q, n in history))) if cheap else None
ledger = SiteLedger(LedgerFile(path), request, 1e6, 1e-6, compose)
ledger.known_noise(q)
ledger.check(sigma, q, 2)
ledger.identify("records")
ledger.reserve(sigma, q, 2)
ledger.take_step()
ledger.take_step()
ledger.commit()
ledger.epsilon()
print(time.process_time() - begun)
"""


def sigma_of(pair: int) -> float:
    return 1.0 + pair / 64


def rounds_of(rounds: int, pairs: int, runs: int) -> Iterator[Entry]:
    """The entries of so many finished rounds, over so many (σ, q) and runs in turn."""
    book = Book()
    book.length = 1  # behind the first entry
    for number in range(rounds):
        sigma, time = sigma_of(number % pairs), written(clock())
        reserve = Reserve(
            *(time, str(number % runs), "la-lora", number, "step:BA", "default", "records", sigma, Q, 1.0, STEPS),
            *(1e6, DELTA, 10**9, HEADLINE, 1e6, HEADLINE, DELTA, 1.0, book.segments("default", plus=(sigma, Q, STEPS))),
        )
        commit = Commit(time, book.add(reserve), STEPS)
        book.add(commit)
        yield from (reserve, commit)


def made(folder: Path, rounds: int, pairs: int, runs: int) -> Path:
    """A ledger of so many rounds, without a checkpoint."""
    create(path := folder / f"{rounds}-{pairs}-{runs}")
    with closing(sqlite3.connect(path)) as connection:
        ((head,),) = connection.execute("SELECT hash FROM entries")
        for number, entry in enumerate(rounds_of(rounds, pairs, runs), 1):
            head = hash_after(head, body := to_json(entry))
            connection.execute("INSERT INTO entries VALUES (?, ?, ?)", (number, body, head))
        connection.commit()
    return path


def message(path: Path, sigma: float, q: float, *, cheap: bool) -> float:
    """CPU milliseconds of one message in a process of its own."""
    command = [sys.executable, "-c", MESSAGE, str(path), str(sigma), str(q), "cheap" if cheap else "real"]
    return 1000 * float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def row(folder: Path, rounds: int, pairs: int, runs: int) -> list[str]:
    path = made(folder, rounds, pairs, runs)
    megabytes = path.stat().st_size / 1e6
    unread = message(path, sigma_of(0), Q, cheap=True)
    ledger = statistics.median(message(path, sigma_of(0), Q, cheap=True) for _ in range(5))
    message(path, sigma_of(0), Q, cheap=False)
    known = statistics.median(message(path, sigma_of(0), Q, cheap=False) for _ in range(5))
    new = statistics.median(message(path, sigma_of(PAIRS + n) + 0.001, Q, cheap=False) for n in range(3))
    shutil.rmtree(LedgerFile(path).cache)
    path.unlink()
    return [f"{rounds:,}", str(pairs), f"{runs:,}", f"{megabytes:.1f}", *(f"{ms:.0f}" for ms in (ledger, known, new, unread))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, nargs="+", default=[10, 1000, 10000])
    parser.add_argument("--folder", type=Path, help="where the ledgers lie for a moment; default: the temporary folder")
    options = parser.parse_args()
    print("| rounds | (σ, q) | runs | MB | ledger | with ε | with ε, new (σ, q) | no checkpoint |")
    print("|---" * 8 + "|")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        cases = [(rounds, pairs, 1) for rounds in options.rounds for pairs in (1, PAIRS)]
        for case in [*cases, (max(options.rounds), 1, max(options.rounds))]:
            print("| " + " | ".join(row(Path(folder), *case)) + " |", flush=True)


if __name__ == "__main__":
    main()
