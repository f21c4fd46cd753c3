"""Records whose gradients are orthogonal directions: each can be seen in a released sum as if it were alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lalora_flwr.data.inputs import Inputs
from lalora_flwr.data.records import Records
from lalora_flwr.settings import Settings
from lalora_flwr.training.learner import Learner, LearnerCache, ModelStore

FILLER = -1  # label of a record with no gradient at all
TOO_LONG = 10.0  # a canary's gradient, in units of C: the clip has work to do
MOST = 2000  # canaries of a site
ENOUGH = 64  # of a site: below, directions may have fewer coordinates
COORDINATES = 8  # of a canary's direction, at least, where the tensors have as many: it then lies in several of them


@dataclass(frozen=True)
class Canaries:
    """The canaries of one site.

    Attributes:
        inside: for each, by a fair coin of its own, whether it is among the site's records, bool (m,).
        records: how many records the site has; those that are no canaries have no gradient.
    """

    inside: NDArray[np.bool_]
    records: int

    @property
    def count(self) -> int:
        return len(self.inside)

    def as_records(self) -> Records:
        """The site's records: what a model would see of them is nothing, a label says which canary it is."""
        labels = np.full(self.records, FILLER)
        labels[: int(self.inside.sum())] = np.flatnonzero(self.inside)
        return Records(torch.zeros(self.records, 1, 2, 2), torch.from_numpy(labels))


def canaries(records: int, entries: int, random: np.random.Generator) -> Canaries:
    """As many as the site's records and the trained tensors hold.

    Args:
        records: of the site.
        entries: of the tensors that train at a step, the fewest.
        random: of the coins.
    """
    room = max(entries // COORDINATES, min(entries, ENOUGH))
    count = min(MOST, room, max(1, int(2 * records - 6 * math.sqrt(records))))
    while (inside := random.random(count) < 0.5).sum() > records:
        pass
    return Canaries(inside, records)


def direction(canary: int, count: int, entries: int) -> slice:
    """Where the direction of a canary is not zero, among the entries of a step's tensors one after the other."""
    return slice(canary, entries, count)


def projected(row: Tensor, count: int) -> NDArray[np.float64]:
    """A vector (entries,) along the unit direction of each canary, (count,); 0 for one that has none."""
    entries = len(row)
    lines = math.ceil(entries / count)
    padded = torch.zeros(lines * count, dtype=torch.float64)
    padded[:entries] = row.to("cpu", torch.float64)
    sums = padded.view(lines, count).sum(0).numpy()
    sizes = np.array([len(range(canary, entries, count)) for canary in range(count)])
    found: NDArray[np.float64] = sums / np.sqrt(np.maximum(sizes, 1))
    return found


@dataclass(frozen=True)
class CanaryLearner(Learner):
    """The run's learner, but for gradients, which follow from the labels: a canary's own direction, or nothing.

    Attributes:
        count: of the canaries of the site at work.
        drawn: is told the labels of each pass.
        length: of a canary's gradient.
    """

    count: Callable[[], int]
    drawn: Callable[[Tensor], None]
    length: float

    def gradients(self, inputs: Inputs, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        self.drawn(labels)
        active = {name: p for name, p in self.adapter.parameters.items() if p.requires_grad}
        sizes, count = [p.numel() for p in active.values()], self.count()
        entries = sum(sizes)
        rows = torch.zeros(len(labels), entries)
        for row, canary in enumerate(labels.tolist()):
            if 0 <= canary < entries:
                where = direction(canary, count, entries)
                rows[row, where] = self.length / math.sqrt(len(range(canary, entries, count)))
        pieces = zip(active.items(), torch.split(rows, sizes, 1), strict=True)
        return {name: piece.reshape(len(labels), *p.shape) for (name, p), piece in pieces}, torch.zeros(len(labels))


class CanaryLearners(LearnerCache):
    """Makes the run's learners with canaries' gradients."""

    def __init__(self, models: ModelStore, count: Callable[[], int], drawn: Callable[[Tensor], None], clip_norm: float) -> None:
        super().__init__(models)
        self._about = (count, drawn, TOO_LONG * clip_norm)

    def learner(self, settings: Settings, device: str = "") -> Learner:
        own = super().learner(settings, device)
        return CanaryLearner(own.base, own.adapter, own.engine, own.initial, *self._about)
