"""Writing small files beside a ledger so that neither a crash nor another process ever finds a part of one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, text: str, *, durable: bool) -> None:
    """Put ``text`` at ``path``, readable by its owner only: whoever reads finds the old content or the new, never a part.

    With ``durable`` it is on disk when this returns, its name in the folder included.

    Raises:
        OSError: if it cannot be written; the old content is then still there.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
            file.write(text)
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


def sync_folder(folder: Path) -> None:
    """Make names that were made or changed in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
