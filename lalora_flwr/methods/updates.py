"""What the server knows of a round's updates: each of them, or only their sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = Mapping[str, NDArray[np.floating[Any]]]  # by slot
Factors = tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]  # A (r, n), B (m, r)


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


def factors_sent(updates: Sequence[Update], current: Tensors, name_A: str, name_B: str) -> list[Factors]:
    """A and B of a layer at each site that trained either, of the rank that the site holds.

    A factor that did not train, and so was not sent, is that of the round's start.
    """
    pairs = []
    for tensors in (update.tensors for update in updates):
        if name_A in tensors or name_B in tensors:
            A, B = tensors.get(name_A, current[name_A]), tensors.get(name_B, current[name_B])
            rank = min(len(A), B.shape[1])  # one that was not sent is of the run's
            pairs.append((A[:rank], B[:, :rank]))
    return pairs


def stacked(pairs: Sequence[Factors]) -> Factors:
    """All A (R, n) and all B (m, R), float64, of which the product is the sum of the products; R is the sum of the ranks."""
    A, B = zip(*pairs, strict=True)
    return np.concatenate(A, dtype=np.float64), np.concatenate(B, axis=1, dtype=np.float64)


def sum_of_products(pairs: Sequence[Factors]) -> NDArray[np.float64]:
    """Σ B_i A_i, (m, n), of at least one pair."""
    A, B = stacked(pairs)
    return B @ A


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
