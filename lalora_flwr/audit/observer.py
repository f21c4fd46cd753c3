"""Watches a run's sites from inside their process: what each step lets out, and which canaries took part in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lalora_flwr.audit.canaries import Canaries, canaries, projected
from lalora_flwr.data.records import RecordSet
from lalora_flwr.models.base import BaseModel
from lalora_flwr.privacy.counting import Ledger
from lalora_flwr.privacy.mechanism import Mechanism, PrivateSum, Share
from lalora_flwr.privacy.randomness import RandomSource
from lalora_flwr.settings import Settings
from lalora_flwr.site.records import NodeConfig
from lalora_flwr.training.local import MakeSum

SHOWN = 4096  # entries of a release that are kept, of those on which no canary lies


@dataclass
class Step:
    """One release of one site.

    Attributes:
        mechanism: its constants.
        noise: the standard deviation that its noise is to have, in units of C.
        drawn: the labels of the records that took part, as the learner saw them.
        projections: of the released sum, over C, along the direction of each canary, (canaries,).
        rest: some entries of the released sum, over C, that no canary inside touches.
        released: the tensors as they were let out.
    """

    mechanism: Mechanism
    noise: float
    drawn: list[int] = field(default_factory=list)
    projections: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    rest: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    released: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Watched:
    """A site: its canaries and all its steps, in order."""

    canaries: Canaries
    steps: list[Step] = field(default_factory=list)


class Observer:
    """Hands a host the records, the sums and the count of canaries of its sites, which work one after the other."""

    def __init__(
        self,
        random: np.random.Generator,
        entries: int,
        records: Mapping[int, int],
        *,
        only_first: bool,
        make_sum: MakeSum = PrivateSum,
        views: int = 1,
        ahead: bool = False,
    ) -> None:
        """
        Args:
            random: of the coins.
            entries: of the tensors that train at a step, the fewest.
            records: of each site.
            only_first: the first site alone has canaries, as where only the sum of all sites is let out.
            make_sum: what is watched.
            views: how often a pass sees each record, one after the other.
            ahead: whether every pass but those of a site's first step is followed by another over the same records, elsewhere.
        """
        self.sites: dict[int, Watched] = {}
        for site, count in records.items():
            if only_first and self.sites:  # its releases are looked at along the directions of the first one's
                own = Canaries(np.zeros(next(iter(self.sites.values())).canaries.count, dtype=bool), count)
            else:
                own = canaries(count, entries, random)
            self.sites[site] = Watched(own)
        self._ahead, self._before = ahead, list[int]()
        self._make_sum, self._views, self._here = make_sum, views, next(iter(self.sites.values()))

    def records(self, settings: Settings, node_config: NodeConfig, base: BaseModel) -> RecordSet:
        """As `lalora_flwr.site.records.RecordStore` has it."""
        self._here = self.sites[int(node_config["partition-id"])]
        return self._here.canaries.as_records()

    def count(self) -> int:
        """Canaries of the site at work."""
        return self._here.canaries.count

    def drawn(self, labels: Tensor) -> None:
        """The records of a pass."""
        steps, found = self._here.steps, labels[:: self._views].tolist()
        if self._ahead and len(steps) > 1 and found == self._before:
            self._before = []  # a third pass would count
            return
        self._before = found
        steps[-1].drawn.extend(found)

    def make_sum(self, mechanism: Mechanism, shapes: Mapping[str, torch.Size], device: torch.device) -> PrivateSum:
        """A sum that is watched."""
        step = Step(mechanism, mechanism.noise_multiplier)
        self._here.steps.append(step)
        return _WatchedSum(self._make_sum(mechanism, shapes, device), step, self._here.canaries)


class _WatchedSum(PrivateSum):
    """Lets all through, and keeps what was let out."""

    def __init__(self, own: PrivateSum, step: Step, of: Canaries) -> None:
        self._own, self._step, self._of = own, step, of
        self.not_finite = 0

    def add(self, per_sample: Mapping[str, Tensor]) -> None:
        self._own.add(per_sample)
        self.not_finite = self._own.not_finite

    def release(self, ledger: Ledger, source: RandomSource) -> dict[str, Tensor]:
        released = self._own.release(ledger, source)
        self._keep(released, self._step.mechanism.expected_batch)
        return released

    def release_share(self, ledger: Ledger, source: RandomSource, share: Share, kept: Collection[str] = ()) -> dict[str, Tensor]:
        released = self._own.release_share(ledger, source, share, kept)
        self._step.noise = share.multiplier
        more = share.std / max(self._step.mechanism.noise_std, share.std)  # what stays has more noise: scaled to the share's
        self._keep(released, share.step, dict.fromkeys(kept, self._step.mechanism.expected_batch * more))
        return released

    def _keep(self, released: dict[str, Tensor], unit: float, units: Mapping[str, float] = MappingProxyType({})) -> None:
        """``unit``: what a released 1 is of the sum; ``units``: of tensors of which it is another."""
        self._step.released = {name: value.clone() for name, value in released.items()}
        rows = [value.flatten().to("cpu", torch.float64) * units.get(name, unit) for name, value in released.items()]
        row = torch.cat(rows) / self._step.mechanism.clip_norm
        count = self._of.count
        self._step.projections = projected(row, count)
        free = ~self._of.inside[np.arange(len(row)) % count] if self._of.inside.any() else np.ones(len(row), dtype=bool)
        self._step.rest = row.numpy()[free][:SHOWN]


class ReplayedSum(PrivateSum):
    """In place of a sum: lets out what another one let out, whatever is added."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self.not_finite = 0

    def add(self, per_sample: Mapping[str, Tensor]) -> None:
        pass

    def release(self, ledger: Ledger, source: RandomSource) -> dict[str, Tensor]:
        ledger.take_step()
        return {name: value.clone() for name, value in self._step.released.items()}

    def release_share(self, ledger: Ledger, source: RandomSource, share: Share, kept: Collection[str] = ()) -> dict[str, Tensor]:
        return self.release(ledger, source)
