"""How the server combines what the sites send. Everything here works on released tensors: free under DP.

`mean` believes every site. `median` and `trimmed_mean` (arXiv 1803.01498) bound what a few sites can do to the result,
whatever they send; `bounded` does the same for any merge, by a public bound on each site's update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = Mapping[str, NDArray[np.floating[Any]]]
Merged = dict[str, NDArray[np.float32]]


def mean(replies: Sequence[Tensors]) -> Merged:
    """Uniform mean of each tensor over the replies (FedAvg with equal weights; weights by record count would leak counts).

    The sum runs in float64 in the order given: sort the replies by site for a result that does not depend on arrival.

    Args:
        replies: one mapping a site, all with the same names and shapes; at least one.

    Returns:
        The means, float32, under the same names.
    """
    return {
        name: np.asarray(np.mean([reply[name] for reply in replies], axis=0, dtype=np.float64), dtype=np.float32)
        for name in replies[0]
    }


def _sorted(replies: Sequence[Tensors], name: str) -> NDArray[np.float64]:
    """All values of a tensor, float64, of shape (sites, *shape), ascending along the first axis."""
    return np.sort(np.stack([reply[name] for reply in replies]).astype(np.float64), axis=0)


def median(replies: Sequence[Tensors]) -> Merged:
    """Median of each coordinate over the replies; with an even number, the mean of the middle two. Independent of their order.

    With n replies, any (n - 1) // 2 of them leave each coordinate between the smallest and the largest value of the others.

    Args:
        replies: as for `mean`; with fewer than three, one of them decides.
    """
    return trimmed(replies, (len(replies) - 1) // 2)


def trimmed_mean(replies: Sequence[Tensors], trim: float) -> Merged:
    """Mean of each coordinate without its smallest and largest values. Independent of the order of the replies.

    As many replies as are cut at one end leave each coordinate between the smallest and the largest value of the others.

    Args:
        replies: as for `mean`.
        trim: share of the replies that is cut at each end, in (0, 0.5), rounded down to whole replies.
    """
    return trimmed(replies, num_cut(len(replies), trim))


def trimmed(replies: Sequence[Tensors], cut: int) -> Merged:
    """Mean of each coordinate, in float64, without its ``cut`` smallest and ``cut`` largest values."""
    return {
        name: np.asarray(_sorted(replies, name)[cut : len(replies) - cut].mean(axis=0), dtype=np.float32) for name in replies[0]
    }


def num_cut(replies: int, trim: float) -> int:
    """How many replies a share is, rounded down, so that one at least stays between two cuts.

    0.29 of 100 is 29, although 0.29 * 100 is less in floating point.
    """
    return min(math.floor(replies * trim + 1e-9), (replies - 1) // 2)


MERGES: dict[str, Callable[..., Merged]] = {"mean": mean, "median": median, "trimmed-mean": trimmed_mean}


def bounded(reply: Tensors, sent: Tensors, largest: float) -> tuple[Tensors, float]:
    """A reply whose distance from what the site was sent is at most ``largest``.

    Args:
        reply: of a site; finite.
        sent: the same tensors as the site got them.
        largest: bound on the L2 norm of the update over all tensors together, above 0.

    Returns:
        The reply itself if it is within the bound, else the point on the way to it that is (float64); and the update's norm.
    """
    updates = {name: value.astype(np.float64) - sent[name] for name, value in reply.items()}
    norm = math.sqrt(sum(float(np.square(update).sum()) for update in updates.values()))
    if norm <= largest:
        return reply, norm
    return {name: sent[name] + update * (largest / norm) for name, update in updates.items()}, norm
