"""Where short process and trainer meet: a socket in a folder of the owner's user alone, below FLWR_HOME.

Guarantee: the folder belongs to the process's own user and nobody else may enter it, and it is used by the handle that was
looked at, so that no link put in its way leads elsewhere. The socket itself has mode 0600, and each side asks the kernel which
user the other one is, where the system tells (Linux).
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from lalora_flwr.ground.files import lock

LONGEST_PATH = 100  # bytes; a socket's path may have 104 on macOS and 108 on Linux
_HANDLES = Path("/proc/self/fd")  # on Linux: paths that begin at an open folder, and are short


class NoPlace(Exception):
    """The folder or the socket cannot be used; its text is one line for the site's own log."""


@dataclass(frozen=True)
class Peer:
    """The process at the other end, as the kernel knows it; None: the system does not tell."""

    user: int | None
    process: int | None


def peer_of(connection: socket.socket) -> Peer:
    if not hasattr(socket, "SO_PEERCRED"):
        return Peer(None, None)
    process, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return Peer(user, process)


def is_own(peer: Peer) -> bool:
    """Whether the peer belongs to this process's user, as far as the system tells; the folder keeps all others out."""
    return peer.user is None or peer.user == os.geteuid()


class Place:
    """A folder with the socket and the lock of one site, as a context that holds the folder open."""

    def __init__(self, folder: Path, name: str) -> None:
        """
        Args:
            folder: made if it is missing.
            name: of the site among all that share the folder.
        """
        self.folder, self.name = folder, name
        self._handle = -1
        self._held: BinaryIO | None = None

    def __enter__(self) -> Place:
        """
        Raises:
            NoPlace: the folder cannot be made, or others than this user may enter it.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise NoPlace(f"{self.folder}: {error.strerror}") from None
        found = os.fstat(self._handle)
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            self.__exit__(None, None, None)
            raise NoPlace(f"{self.folder}: has to belong to this user alone, with mode 700")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._held:
            self._held.close()
            self._held = None
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def take(self) -> bool:
        """Hold the site's lock until the context ends, or this process; False: another process holds it."""
        try:
            self._held = lock(self._path(f"{self.name}.lock"))
        except BlockingIOError:
            return False
        except OSError as error:
            raise NoPlace(f"{self.folder}: {error.strerror}") from None
        return True

    def connect(self, seconds: float) -> socket.socket | None:
        """A connection to the site's trainer; None if there is none."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(seconds)
            connection.connect(self._address())
        except OSError:
            connection.close()
            return None
        return connection

    def listen(self) -> socket.socket:
        """The trainer's own end.

        Raises:
            NoPlace: it cannot be made.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            listener.bind(self._address())
            listener.listen(1)
        except OSError as error:
            listener.close()
            raise NoPlace(f"{self.folder}: no socket can be made: {error.strerror}") from None
        finally:
            os.umask(before)
        return listener

    def clear(self) -> None:
        """Take the socket's name away; whoever listens there can no longer be reached."""
        with suppress(OSError):
            os.unlink(self.name, dir_fd=self._handle)

    def mark(self) -> int:
        """What tells this socket from one that takes its name; -1: there is none."""
        try:
            return os.stat(self.name, dir_fd=self._handle, follow_symlinks=False).st_ino
        except OSError:
            return -1

    def _path(self, name: str) -> Path:
        return (_HANDLES / str(self._handle) if _HANDLES.is_dir() else self.folder) / name

    def _address(self) -> str:
        address = str(self._path(self.name))
        if len(os.fsencode(address)) > LONGEST_PATH:
            raise NoPlace(f"{self.folder}: the path is too long for a socket")
        return address


class Grip:
    """Holds on to a process, so that no other one with its number is ended in its place (Linux)."""

    def __init__(self, process: int) -> None:
        self._process, self._handle = process, -1
        with suppress(OSError, AttributeError):  # an old kernel, or another system
            self._handle = os.pidfd_open(process)

    def kill(self) -> None:
        """SIGKILL."""
        with suppress(OSError):
            if self._handle >= 0:
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            else:
                os.kill(self._process, signal.SIGKILL)

    def release(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
