"""Processes that a test starts: none outlives it, and each keeps a log."""

from __future__ import annotations

import ctypes
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

LOOPBACK = "127.0.0.1"
_libc = ctypes.CDLL(None)


def free_port() -> int:
    with socket.socket() as s:
        s.bind((LOOPBACK, 0))
        return int(s.getsockname()[1])


def die_with_the_test() -> None:
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_for(what: str, found: Callable[[], Any], patience: float = 60.0, every: float = 0.1) -> Any:
    """The first true value of ``found``; a failed assertion if there is none in ``patience`` seconds."""
    deadline = time.monotonic() + patience
    while not (value := found()):
        assert time.monotonic() < deadline, f"waited {patience:g} s for {what}"
        time.sleep(every)
    return value


class Running:
    """A process with its log; each start appends to the same file."""

    def __init__(self, name: str, command: list[str], env: Mapping[str, str], folder: Path, log: Path) -> None:
        self.name, self.log = name, log
        self._begin = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                command,
                env=dict(env),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_the_test,
            )

    def said(self) -> str:
        """What it logged since this start."""
        return self.log.read_bytes()[self._begin :].decode(errors="replace")

    def alive(self) -> bool:
        return self.popen.poll() is None

    def exit_code(self, patience: float = 60.0) -> int:
        """Wait for its own end."""
        wait_for(f"the end of {self.name}; it said: {self.said()[-2000:]}", lambda: not self.alive(), patience)
        return int(self.popen.returncode)

    def kill(self) -> None:
        """SIGKILL to this process alone. What it started ends by itself: at once after `SITE_START`, else within 20 seconds."""
        self.popen.kill()
        self.popen.wait()

    def terminate(self) -> None:
        """SIGTERM, which Flower takes as a request to stop in order."""
        self.popen.terminate()
        self.popen.wait(timeout=60)

    def descendants(self, command: str = "") -> list[psutil.Process]:
        """Processes below this one whose command line holds ``command``: flwr-serverapp, flwr-clientapp, …"""
        found = []
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.popen.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if command in " ".join(child.cmdline()):
                        found.append(child)
        return found
