"""Values that are worth keeping, by everything that decides them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Generic, TypeVar

from lalora_flwr.ground.files import files_below

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

Mark = tuple[str, int, int, int, int]  # path, inode, size in bytes, and when content and state were last changed, in ns
Stamp = tuple[Mark, ...]


class Cache(Generic[K, V]):
    """The values that were last used.

    A key has to hold everything that decides its value: what lies on disk by its `stamp`. For one thread.
    """

    def __init__(self, size: int, weigh: Callable[[V], int] = lambda value: 1) -> None:
        """
        Args:
            size: how much the kept values weigh together at most; 0 keeps none.
            weigh: what a value weighs, such as its bytes, when it is made; by default values are counted.
        """
        self._size, self._weigh, self._total = size, weigh, 0
        self._kept: dict[K, tuple[V, int]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of a key, made if it is not kept; whatever ``make`` raises is raised, and nothing is kept."""
        if key in self._kept:
            found = self._kept.pop(key)
        else:
            value = make()
            found = value, self._weigh(value)
            self._total += found[1]
        self._kept[key] = found  # the last used come last
        while self._total > self._size:
            self._total -= self._kept.pop(next(iter(self._kept)))[1]
        return found[0]


def stamp(*paths: Path) -> Stamp:
    """What changes when one of the files or folders is written, replaced, or gone, whatever its times are set to; no content is
    read.

    A folder changes when a name in it comes or goes, and not with what its files hold. What is not there has a stamp too.
    """
    return tuple(_mark(path) for path in paths)


def stamp_below(pattern: str) -> Stamp:
    """The stamp of all files that a pattern names: a file, a glob, or a folder with all below it.

    Equal before and after they were read, it says that all of what was read is of one state.
    """
    return stamp(*files_below(pattern))


def _mark(path: Path) -> Mark:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return str(path), -1, -1, -1, -1
    return str(path), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
