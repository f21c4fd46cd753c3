"""Which systems the package runs on."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

POSIX_ONLY = ("fcntl", "resource")  # file locks, peak memory


def require_posix(modules: Iterable[str] = POSIX_ONLY) -> None:
    """Refuse a system on which locks of files would be missing: a ledger without them could be spent twice.

    Raises:
        ImportError: one line that names the systems on which the package works.
    """
    try:
        for module in modules:
            import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"lalora-flwr runs on Linux, and untested on other POSIX systems; this one lacks {error.name} "
            "(on Windows use WSL 2 or a container)"
        ) from None
