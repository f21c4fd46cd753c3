"""What the server knows of a round's updates: each of them, or only their sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = Mapping[str, NDArray[np.floating[Any]]]  # by slot


@dataclass(frozen=True)
class Update:
    """What one site sent: its tensors after the round, of the shapes that it holds."""

    site: int
    tensors: Tensors


class SumOnly(RuntimeError):
    """A merge asked for single updates where the transport shows their sum only."""


@dataclass(frozen=True)
class Updates:
    """A round's updates as a transport hands them to a merge.

    Attributes:
        total: their sum, float64, in the order of the sites.
        count: how many there are.
        known: each of them, in the order of the sites; None if the transport hides them.
    """

    total: Mapping[str, NDArray[np.float64]]
    count: int
    known: Sequence[Update] | None = None

    @property
    def each(self) -> Sequence[Update]:
        """The updates one by one.

        Raises:
            SumOnly: the transport hides them. A merge that needs them says so by ``needs_each``, and never gets here.
        """
        if self.known is None:
            raise SumOnly("the transport shows the sum of the updates only")
        return self.known


def together(updates: Sequence[Update]) -> Updates:
    """Updates that are known one by one. Those of one shape are summed; of sites that differ a merge has to make its own sum."""
    return Updates(_Sums(updates), len(updates), tuple(updates))


class _Sums(Mapping[str, NDArray[np.float64]]):
    """Sums of float32 tensors in float64, made when they are asked for."""

    def __init__(self, updates: Sequence[Update]) -> None:
        self._updates = updates

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return np.asarray(np.sum([update.tensors[name] for update in self._updates], axis=0, dtype=np.float64))

    def __iter__(self) -> Any:
        return iter(self._updates[0].tensors)

    def __len__(self) -> int:
        return len(self._updates[0].tensors)
