"""How the server combines what the sites send. Everything here works on released tensors: free under DP.

`Mean` believes every site. `Median` and `TrimmedMean` (arXiv 1803.01498) bound what a few sites can do to the result,
whatever they send; `bounded` does the same for any merge, by a public bound on each site's update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lalora_flwr.adapter.slots import Layout
from lalora_flwr.methods.updates import Tensors, Update, Updates
from lalora_flwr.settings.schema import MergeSettings
from lalora_flwr.wire.public import Public

Merged32 = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Memory:
    """What a merge keeps from round to round. It is part of the checkpoint, so a resumed run finds it again.

    Attributes:
        notes: JSON.
        tensors: arrays by name, float64.
    """

    notes: Public = field(default_factory=dict)
    tensors: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)


@dataclass(frozen=True)
class Now:
    """Where a merge stands: public facts of the round.

    Attributes:
        server_round: from 1.
        layout: the slots as the server holds them.
        settings: the ``merge.*`` keys.
        directive: the one under which the round was trained.
        rounds: of the run, all of them.
        seed: the run's, for what a merge draws.
        gradients: whether the updates are gradients, as where the server takes the step, or adapters after the sites' steps.
        noise: standard deviation of the noise on an entry of the mean of the updates, by slot that trained; None where it is not
            known (`lalora_flwr.methods.method.unknown_noise`).
    """

    server_round: int
    layout: Layout
    settings: MergeSettings
    directive: Public
    rounds: int = 1
    seed: int = 0
    gradients: bool = False
    noise: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Merged:
    """What a merge decides.

    Attributes:
        tensors: the new values of slots; slots that are not named keep theirs.
        memory: what it wants to keep.
        directive: how the next round is steered, for the method's schedule; everybody may know it.
        rewritten: the adapter is the same expressed in other tensors (SVD, rotation), so that no average goes across it.
    """

    tensors: Merged32
    memory: Memory = field(default_factory=Memory)
    directive: Public = field(default_factory=dict)
    rewritten: bool = False


class Merge:
    """How the server combines a round's updates.

    Attributes:
        name: as ``merge.name`` and summaries write it.
        takes_gradients: whether it makes as good sense of gradients as of adapters, as what works on each coordinate does.
        rewrites: whether it expresses the adapter in other factors (`Merged.rewritten`), whose gradients are not those of before.
        takes_parts: whether it makes sense of sites that send other slots than others do, or corners of them.
        needs_each: whether it looks at single updates; if not, their sum is all that it uses, and a transport may hide the rest.
        needs_parts: the parts of slots that it combines in a way of their own.
        moves_frozen: whether it changes slots that do not train, so that all must go down.
        steers: whether its directives say what trains.
        stride_A, stride: how much longer than with a mean lora_A, and all else, like to be moved by the noise, for the
            learning rate's rule.
        robust: whether a minority of updates, however long, leaves the result between what the others say.
    """

    name: str = ""
    needs_each: bool = True
    takes_gradients: bool = False
    rewrites: bool = False
    needs_parts: frozenset[str] = frozenset()
    moves_frozen: bool = False
    takes_parts: bool = False
    steers: bool = False
    stride_A: float = 1.0
    stride: float = 1.0
    robust: bool = False

    def least_updates(self, settings: MergeSettings) -> int:
        """With fewer updates in a round the run stops."""
        return 1

    def start(self, layout: Layout) -> Public:
        """The directive of the first round."""
        return {}

    def __call__(self, current: Tensors, updates: Updates, memory: Memory, now: Now) -> Merged:
        """Combine.

        Args:
            current: the adapter that the round started from, every slot of it, float32. Must not be changed.
            updates: of the sites that served the round; at least `least_updates`.
            memory: what this merge returned last; empty in the first round.
            now: the round.
        """
        raise NotImplementedError


class Mean(Merge):
    """Uniform mean of each tensor (FedAvg with equal weights; weights by record count would leak counts).

    The sum runs in float64 in the order of the sites, so the result does not depend on which reply arrived first.
    """

    name = "mean"
    needs_each = False
    takes_gradients = True

    def __call__(self, current: Tensors, updates: Updates, memory: Memory, now: Now) -> Merged:
        return Merged({name: np.asarray(total / updates.count, dtype=np.float32) for name, total in updates.total.items()})


class Median(Merge):
    """Median of each coordinate; with an even number of updates, the mean of the middle two. Independent of their order.

    With n updates, any (n - 1) // 2 of them leave each coordinate between the smallest and the largest value of the others;
    with fewer than three, one of them would decide.
    """

    name = "median"
    takes_gradients = robust = True

    def least_updates(self, settings: MergeSettings) -> int:
        return 3

    def __call__(self, current: Tensors, updates: Updates, memory: Memory, now: Now) -> Merged:
        return Merged(trimmed(updates.each, (updates.count - 1) // 2))


class TrimmedMean(Merge):
    """Mean of each coordinate without its smallest and largest values. Independent of the order of the updates.

    As many updates as are cut at one end leave each coordinate between the smallest and the largest value of the others.
    ``merge.trim`` is the share of the updates that is cut at each end, rounded down to whole ones.
    """

    name = "trimmed-mean"
    takes_gradients = robust = True

    def least_updates(self, settings: MergeSettings) -> int:
        return max(3, math.ceil(min(1 / settings.trim, 1e9) - 1e-9))

    def __call__(self, current: Tensors, updates: Updates, memory: Memory, now: Now) -> Merged:
        return Merged(trimmed(updates.each, num_cut(updates.count, now.settings.trim)))


MEAN = Mean()
MEDIAN = Median()
TRIMMED_MEAN = TrimmedMean()


def trimmed(updates: Sequence[Update], cut: int) -> Merged32:
    """Mean of each coordinate, in float64, without its ``cut`` smallest and ``cut`` largest values."""
    return {
        name: np.asarray(_sorted(updates, name)[cut : len(updates) - cut].mean(axis=0), dtype=np.float32)
        for name in updates[0].tensors
    }


def _sorted(updates: Sequence[Update], name: str) -> NDArray[np.float64]:
    """All values of a tensor, float64, of shape (sites, *shape), ascending along the first axis."""
    return np.sort(np.stack([update.tensors[name] for update in updates]).astype(np.float64), axis=0)


def num_cut(updates: int, trim: float) -> int:
    """How many updates a share is, rounded down, so that one at least stays between two cuts.

    0.29 of 100 is 29, although 0.29 * 100 is less in floating point.
    """
    return min(math.floor(updates * trim + 1e-9), (updates - 1) // 2)


def length_of(tensors: Tensors) -> float:
    """The L2 norm of all of them together."""
    return math.sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in tensors.values()))


def bounded(update: Tensors, sent: Tensors, largest: float) -> tuple[Tensors, float]:
    """An update whose distance from what the site was sent is at most ``largest``.

    Args:
        update: of a site; finite.
        sent: the same tensors as the site got them.
        largest: bound on the L2 norm of the difference over all tensors together, above 0.

    Returns:
        The update itself if it is within the bound, else the point on the way to it that is (float64); and the norm.
    """
    moved = {name: value.astype(np.float64) - sent[name] for name, value in update.items()}
    norm = length_of(moved)
    if norm <= largest:
        return update, norm
    return {name: sent[name] + difference * (largest / norm) for name, difference in moved.items()}, norm
