"""HetLoRA (arXiv 2401.06432), zero-padded: a rank for each site, from its profile.

    server:   sends the first r_k rows of A and columns of B
    site k:   trains what its profile says of both;  sends that
    server:   A = mean of A_k, B = mean of B_k, each entry over the sites that trained it (``per-entry``, the strategy's own),
              or over all sites, a missing entry as zero (``zero-padded``, as published)

Zero padding shrinks the components that few sites hold: with three sites of ten, to 0.3 of themselves each round. The mean
over those that trained an entry does not, but its noise is larger there: it falls with the root of their number.
A mean of factors is not the mean of products, whatever the ranks: ``flexlora`` merges those.

Safe under record-level DP: both work on what sites released. Left out: the pruning of ranks, which looks at raw local losses, and
weights by the norm of each site's product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lalora_flwr.adapter.slots import Layout
from lalora_flwr.methods.merges import Memory, Merge, Merged, Now
from lalora_flwr.methods.method import Method
from lalora_flwr.methods.parts import PARTS
from lalora_flwr.methods.schedules import BOTH
from lalora_flwr.methods.updates import Tensors, Update, Updates


class PerEntry(Merge):
    """Each entry's mean over the sites that trained it; one that none trained keeps its value. The sum is in float64."""

    name = "per-entry"
    takes_parts = True

    def __call__(self, current: Tensors, updates: Updates, memory: Memory, now: Now) -> Merged:
        tensors = {}
        for name, (total, count) in sums_of(updates.each, now.layout).items():
            tensors[name] = np.where(count > 0, total / np.maximum(count, 1), current[name]).astype(np.float32)
        return Merged(tensors)


class ZeroPadded(Merge):
    """Each entry's mean over all sites of the round, where those that do not hold it count as zero.

    A slot that a site holds and does not train counts for the sites that trained it alone: a frozen layer is no zero.
    """

    name = "zero-padded"
    takes_parts = True

    def __call__(self, current: Tensors, updates: Updates, memory: Memory, now: Now) -> Merged:
        tensors = {}
        for name, (total, _) in sums_of(updates.each, now.layout).items():
            tensors[name] = np.asarray(total / sum(name in update.tensors for update in updates.each), dtype=np.float32)
        return Merged(tensors)


def sums_of(updates: Sequence[Update], layout: Layout) -> Mapping[str, tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """For each slot that any site sent: the sum of what came, in the order of the sites, and of how many sites each entry is."""
    sums: dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]] = {}
    for update in updates:
        for name, value in update.tensors.items():
            shape = layout[name].shape
            total, count = sums.setdefault(name, (np.zeros(shape), np.zeros(shape, dtype=np.int64)))
            own = tuple(slice(size) for size in value.shape)
            total[own] += value
            count[own] += 1
    return sums


PER_ENTRY = PerEntry()
ZERO_PADDED = ZeroPadded()
METHOD = Method(schedule=BOTH, travel=PARTS, merge=PER_ENTRY)
