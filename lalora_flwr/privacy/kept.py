"""Calibrated noise on disk, for simulations: the next run, and the other workers of this one, need not search again.

A real site has no use for it, and `Calibrations.open` is never called in its process: its σ must not come from a file. Even
in a simulation the file decides nothing: a value that is read from it has to keep to ε by the accountant's own word.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import stat
from collections.abc import Sequence
from contextlib import closing, suppress
from importlib.metadata import version
from pathlib import Path

CACHE = "LALORA_CACHE"  # environment variable: the folder for what can be made again; empty: none
FILE = "calibrations.sqlite"
BUSY = 0.5  # seconds that a worker waits for another's write
MOST = 200_000  # values, about 30 MB
_SOURCES = ("accounting.py", "events.py", "composition/*.py")
_PACKAGES = ("numpy", "scipy", "opacus")


def cache_folder() -> Path | None:
    """Where a user's programs keep what they can make again; None if there is no such place."""
    if (named := os.environ.get(CACHE)) is not None:
        folder = Path(named) if named else None
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME", "") or "~/.cache") / "lalora-flwr"
    try:
        return folder and folder.expanduser()
    except RuntimeError:
        return None


def made_by() -> list[str]:
    """What decides a calibrated σ besides its question: the accountants' versions, and the digest of this package's own."""
    sources = hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(Path(__file__).parent.glob(pattern)):
            sources.update(path.read_bytes())
    return [*(f"{name} {version(name)}" for name in _PACKAGES), sources.hexdigest()]


class Calibrations:
    """σ by question, in an SQLite file that only its owner can write. Whatever is wrong with it, it counts as empty.

    Guarantee: before `open`, and if the file or its folder belongs to someone else or can be written by others, nothing is
    read and nothing is written.
    """

    def __init__(self) -> None:
        self._file: Path | None = None
        self._made_by: list[str] = []

    def open(self, folder: Path | None) -> None:
        """Use the folder from now on, made if need be; None: none. Only for processes whose sites are all simulated."""
        self._file = None
        if folder is not None:
            with suppress(OSError):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._file, self._made_by = folder / FILE, made_by()

    def get(self, question: Sequence[object]) -> float | None:
        """The σ that was put there for it; None if there is none."""
        if self._file is None or not self._is_own():
            return None
        try:
            with closing(self._connected()) as store:
                found = store.execute("SELECT sigma FROM kept WHERE name = ?", (self._name(question),)).fetchone()
        except (sqlite3.Error, OSError):
            return None
        return found[0] if found and isinstance(found[0], float) else None

    def put(self, question: Sequence[object], sigma: float) -> None:
        """Keep it; if that cannot be done, do nothing. A file that is no such store is replaced."""
        if self._file is None or not self._is_own():
            return
        for _ in range(2):
            try:
                with closing(self._connected()) as store, store:
                    store.execute("CREATE TABLE IF NOT EXISTS kept (name TEXT PRIMARY KEY, sigma REAL)")
                    store.execute("INSERT OR REPLACE INTO kept VALUES (?, ?)", (self._name(question), sigma))
                    store.execute("DELETE FROM kept WHERE rowid <= (SELECT max(rowid) FROM kept) - ?", (MOST,))
                return
            except (sqlite3.OperationalError, OSError):  # busy, full, read-only, no file at all
                return
            except sqlite3.DatabaseError:
                with suppress(OSError):
                    self._file.unlink()

    def _connected(self) -> sqlite3.Connection:
        assert self._file is not None
        os.close(os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))  # SQLite's own would follow the umask
        store = sqlite3.connect(self._file, timeout=BUSY)
        store.execute("PRAGMA synchronous = OFF")  # after a power cut a damaged file is made anew
        return store

    def _is_own(self) -> bool:
        assert self._file is not None
        for path in (self._file.parent, self._file):
            try:
                found = path.lstat()
            except FileNotFoundError:
                continue
            except OSError:
                return False
            if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or stat.S_ISLNK(found.st_mode):
                return False
        return True

    def _name(self, question: Sequence[object]) -> str:
        return hashlib.sha256(json.dumps([self._made_by, question]).encode()).hexdigest()
