"""Names for things that a user chooses by name: those of this package, and those of any other that is installed.

A package adds one through an entry point of the registry's group, as ``[project.entry-points."lalora.methods"]`` with
``my-method = "my_package:METHOD"``. Nothing is imported before its name is used.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from lalora_flwr.ground.errors import ConfigError

T = TypeVar("T")


class Registry:
    """Things of one kind by name.

    A name of this package cannot be taken by another one, and a name that two packages claim is refused when it is used:
    which of them a run would get depended on the order of installation.
    """

    def __init__(self, key: str, group: str, shipped: Mapping[str, str], *, arguments: str = "") -> None:
        """
        Args:
            key: the run-config key that takes the names, for messages.
            group: of entry points.
            shipped: ``module:attribute`` of this package's own.
            arguments: how names that carry an argument behind a colon are written, in words; empty if none does.
        """
        self.key, self.group, self.arguments = key, group, arguments
        self._shipped = dict(shipped)
        self._registered: dict[str, object] = {}

    def register(self, name: str, value: object) -> None:
        """Add a value in this process only: sites and servers in other processes need an entry point.

        Raises:
            ValueError: the name is taken.
        """
        if name in self:
            raise ValueError(f"{self.key}: {name!r} is taken")
        self._registered[name] = value

    def names(self) -> list[str]:
        """All names: those of this package first, then the others by alphabet."""
        others = {*self._registered, *(point.name for point in self._points())}
        return [*self._shipped, *sorted(others - set(self._shipped))]

    def __contains__(self, name: object) -> bool:
        return name in self._shipped or name in self._registered or name in self.names()

    def get(self, name: str, kind: type[T]) -> T:
        """The value of a name.

        Args:
            name: one of `names`.
            kind: the class that the value must be of.

        Raises:
            ConfigError: no such name, with the nearest one; or a package that provides it is broken.
        """
        value = self._load(name)
        if not isinstance(value, kind):
            raise ConfigError(f"{self.key} = {name!r}: it is a {type(value).__name__}, not a {kind.__name__}")
        return value

    def _points(self) -> tuple[EntryPoint, ...]:
        return _points_of(self.group, tuple(sys.path))

    def _load(self, name: str) -> object:
        if name in self._registered:
            return self._registered[name]
        if place := self._shipped.get(name):
            module, _, attribute = place.partition(":")
            return getattr(import_module(module), attribute)
        points = {p.value: p for p in self._points() if p.name == name}  # one package may be found twice
        if not points:
            raise ConfigError(f"{self.key} = {name!r}: must be one of {self.suggest(name)}")
        if len(points) > 1:
            raise ConfigError(f"{self.key} = {name!r}: several packages provide it ({', '.join(sorted(points))})")
        point = next(iter(points.values()))
        try:
            return point.load()
        except Exception as error:  # whatever happens in a package that nobody here knows
            raise ConfigError(f"{self.key} = {name!r}: {point.value} cannot be loaded: {error}") from None

    def listed(self, *more: str) -> str:
        """All names, ``more`` among them, and how arguments are written."""
        return ", ".join([*more, *self.names(), *filter(None, [self.arguments])])

    def suggest(self, name: str, *more: str) -> str:
        """All names, ``more`` among them, and the one that is nearest to a wrong one."""
        names = [*more, *self.names()]
        near = difflib.get_close_matches(name, names, n=1)
        return self.listed(*more) + (f"; did you mean {near[0]}?" if near else "")


@lru_cache(maxsize=32)
def _points_of(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Looking through all that is installed takes milliseconds: once per group and search path is enough for a process."""
    return tuple(entry_points(group=group))
