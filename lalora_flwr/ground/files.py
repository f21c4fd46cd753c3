"""Files that neither a crash nor another process ever finds in part, locks between processes, and digests."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from lalora_flwr.ground.errors import ConfigError

OWNER_ONLY, PUBLIC = 0o600, 0o666  # the umask takes its part of the latter
MOST = 2**26  # bytes of a file that is read as a whole


def replace_file(path: Path, content: str | bytes, *, durable: bool = True, mode: int = OWNER_ONLY) -> None:
    """Put ``content`` at ``path``: whoever reads finds the old content or the new, never a part.

    With ``durable`` it is on disk when this returns, its name in the folder included.

    Raises:
        OSError: if it cannot be written; the old content is then still there.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise
    if durable:
        sync_folder(path.absolute().parent)


def append(path: Path, content: bytes, *, mode: int = OWNER_ONLY) -> None:
    """Put ``content`` at the end of a file, made if need be; it is on disk when this returns.

    A crash can leave a part of it: whoever goes on with the file has to know how long it was.
    """
    new = not path.exists()
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, mode), "ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync_folder(path.absolute().parent)


def expanded(path: str | Path) -> Path:
    """With the home folder of a user in place of a leading ``~`` or ``~name``.

    Raises:
        ConfigError: nobody is known by that name.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{str(path)!r}: {Path(path).parts[0]} has no home folder on this machine") from None


def check_place(path: Path) -> None:
    """Before long work whose result `replace_file` is to put there.

    Raises:
        OSError: it cannot be put there.
    """
    if path.is_dir():
        raise OSError("is a folder")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.touch()
    part.unlink()


def sync_folder(folder: Path) -> None:
    """Make names that were made or changed in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(path: Path) -> BinaryIO:
    """The file, made if need be, locked by this process until it is closed.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be made or opened.
    """
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        file.close()
        raise
    return file


def is_locked(path: Path) -> bool:
    """Whether another process holds the file; False if there is none."""
    try:
        if path.exists():
            lock(path).close()
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_small(path: Path, most: int = MOST) -> bytes:
    """A file that a stranger may have left.

    Args:
        most: bytes.

    Raises:
        OSError: it cannot be read, is larger, or is no plain file: a pipe would never end.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("no plain file")
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(f"more than {most >> 20} MiB")
    return content


def files_below(pattern: str) -> list[Path]:
    """All files that a pattern names: a file, a glob, or a folder with all below it, also behind links to folders; sorted.

    Links that lead to nothing are among them, and a folder that is linked into itself is walked once.
    """
    path = expanded(pattern)
    if not path.is_dir():
        return sorted(file for found in glob.glob(str(path), recursive=True) if not (file := Path(found)).is_dir())
    found, walked = [], set()
    for folder, inner, names in os.walk(path, followlinks=True):
        at = os.stat(folder)
        if (at.st_dev, at.st_ino) in walked:
            inner.clear()
            continue
        walked.add((at.st_dev, at.st_ino))
        found += [Path(folder, name) for name in names]
    return sorted(found)
