"""Memory that a process frees and asks for again at every step stays with it."""

from __future__ import annotations

import ctypes
import platform
from functools import lru_cache

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
KEPT = 256 << 20  # bytes at the end of a heap that are not handed back
HEAP = 64 << 20  # bytes of a thread's heaps: those before the last are kept where a whole one is spared
LARGE = 32 << 20  # bytes from which on a piece is mapped by itself; glibc's own upper bound


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Have glibc hand free memory back to the system only from 256 MB on, and map pieces by themselves only from 32 MB on.

    By default a heap's free end goes back at a few MB, so that each step of a site gets its memory page by page from the
    system again: up to a fifth of a round's time where sites have threads of their own (docs/engine.md). Of the whole
    process, once.

    Returns:
        Whether it was done: other C libraries have nothing of the kind.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(M_TRIM_THRESHOLD, KEPT), mallopt(M_TOP_PAD, HEAP), mallopt(M_MMAP_THRESHOLD, LARGE)])
