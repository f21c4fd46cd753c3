"""Real records of virtual sites, with canaries among them: mislabelled ones, random inputs, and gradients of a direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lalora_flwr.audit.canaries import direction
from lalora_flwr.data.data_set import data_set
from lalora_flwr.data.inputs import Inputs, rows
from lalora_flwr.data.partition import site_rows
from lalora_flwr.data.records import RecordSet
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.seeds import derive_seed
from lalora_flwr.methods.method import method_of
from lalora_flwr.models.base import BaseModel
from lalora_flwr.settings import Settings
from lalora_flwr.training.learner import Learner, LearnerCache, ModelStore

REAL, MISLABELLED, RANDOM, GRADIENT = range(4)
KINDS = ("real", "mislabelled", "random inputs", "gradient")
SHARE = 1 / 8  # of a site's records, for each kind of canaries
OWN = -1  # in place of a label: the record's own
UNREADABLE = "data: an image cannot be read; take it out, as the attack needs the same records in every run"


@dataclass(frozen=True)
class Planted:
    """A site's records, some of which were made canaries.

    Attributes:
        records: as the data have them.
        kinds: what each is, int64 (n,).
        labels: of the canaries, `OWN` elsewhere, int64 (n,); that of a gradient canary is its number after the classes.
        seed: of the random inputs.
    """

    records: RecordSet
    kinds: Tensor
    labels: Tensor
    seed: int

    def __len__(self) -> int:
        return len(self.kinds)

    def batch(self, indices: Tensor) -> tuple[Inputs, Tensor]:
        """
        Raises:
            ConfigError: a record cannot be read.
        """
        inputs, labels = self.records.batch(indices)
        if len(labels) != len(indices):
            raise ConfigError(UNREADABLE)
        kinds, given = self.kinds[indices], self.labels[indices]
        if (kinds != REAL).any():
            labels = torch.where(given == OWN, labels, given)
        if isinstance(inputs, Tensor) and (kinds == RANDOM).any():
            inputs = inputs.clone()
            for row in torch.nonzero(kinds == RANDOM).flatten().tolist():
                inputs[row] = self._noise(int(indices[row]), inputs[row])
        return inputs, labels

    def _noise(self, record: int, like: Tensor) -> Tensor:
        """An input of independent values in the range of the one that it replaces."""
        drawn = torch.from_numpy(np.random.default_rng(derive_seed(self.seed, record)).random(tuple(like.shape)))
        low, high = float(like.min()), float(like.max())
        return (low + (high - low) * drawn).to(like.dtype)

    def parts(self, indices: Tensor, most: int) -> list[Tensor]:
        return self.records.parts(indices, most)


@dataclass(frozen=True)
class Pool:
    """All that may be inside a run.

    Attributes:
        sites: each site's records.
        classes: of the labels; a larger one is that of a gradient canary.
        gradients: gradient canaries of all sites.
    """

    sites: tuple[Planted, ...]
    classes: int
    gradients: int

    @property
    def kinds(self) -> NDArray[np.int64]:
        """What each record is, the sites one after the other, (n,)."""
        found: NDArray[np.int64] = torch.cat([site.kinds for site in self.sites]).numpy()
        return found

    def numbers(self) -> NDArray[np.int64]:
        """The numbers of the gradient canaries, in the order of `kinds`."""
        labels = torch.cat([site.labels[site.kinds == GRADIENT] for site in self.sites])
        found: NDArray[np.int64] = (labels - self.classes).numpy()
        return found


def pool_of(settings: Settings, learner: Learner, *, plant: bool) -> Pool:
    """The records of the run's virtual sites, the same for the same settings.

    Args:
        settings: of the run.
        learner: of the run.
        plant: make some of them canaries, as far as the task allows: wrong labels need classes, random inputs need images, and
            gradients steps that are taken by them.

    Raises:
        ConfigError: the records are not here, or cannot be read.
    """
    if settings.data.name == "sites":
        raise ConfigError("data.name = 'sites': the records are at the sites; membership is attacked where they can be read")
    data, base = data_set(settings), learner.base
    split = site_rows(data.classes(), settings.data, settings.seed, settings.num_supernodes, data.owners())
    own = [data.private(rows, base.encode) for rows in split]
    kinds = _kinds(settings, base) if plant else ()
    room = _room(learner)
    sites: list[Planted] = []
    gradients = 0
    for site, records in enumerate(own):
        random = np.random.default_rng(derive_seed(settings.seed, "canaries", site))
        most = max(0, room - gradients)
        sites.append(
            _planted(records, kinds, base.num_classes, gradients, most, random, derive_seed(settings.seed, "inputs", site))
        )
        gradients += int((sites[-1].kinds == GRADIENT).sum())
    return Pool(tuple(sites), base.num_classes, gradients)


def _room(learner: Learner) -> int:
    """How many directions there may be so that each lies in a slot of every part that trains."""
    layout, trainable = learner.adapter.layout, learner.adapter.trainable
    parts = [layout.of(part) & trainable for part in layout.parts]
    return min(max(math.prod(layout[name].shape) for name in part) for part in parts if part)


def _kinds(settings: Settings, base: BaseModel) -> Sequence[int]:
    """The canaries that the task and the method allow."""
    if settings.task == "language" or settings.data.problem_type != "single-label":
        return ()
    steps = method_of(settings).form == "lora" and not settings.ridge_first
    return (MISLABELLED, *((RANDOM,) if settings.task == "image" else ()), *((GRADIENT,) if steps else ()))


def _planted(
    records: RecordSet, wanted: Sequence[int], classes: int, first: int, most: int, random: np.random.Generator, seed: int
) -> Planted:
    """``first``: number of the next gradient canary; ``most``: of which there may be."""
    kinds, labels = np.full(len(records), REAL), np.full(len(records), OWN)
    order, each = random.permutation(len(records)), int(SHARE * len(records))
    for place, kind in enumerate(wanted):
        own = order[place * each : (place + 1) * each]
        if kind == MISLABELLED:
            _, true = records.batch(torch.from_numpy(own))
            if len(true) != len(own):
                raise ConfigError(UNREADABLE)
            labels[own] = (true.numpy() + random.integers(1, classes, len(own))) % classes
        elif kind == RANDOM:
            labels[own] = random.integers(0, classes, len(own))
        else:
            own = own[:most]
            labels[own] = classes + first + np.arange(len(own))
        kinds[own] = kind
    return Planted(records, torch.from_numpy(kinds), torch.from_numpy(labels), seed)


@dataclass(frozen=True)
class PlantedLearner(Learner):
    """The run's learner, but for the gradients of gradient canaries: each a direction of its own that lies in every slot.

    Attributes:
        classes, count: as `Pool` has them.
        length: of a canary's gradient.
    """

    classes: int
    count: int
    length: float

    def gradients(self, inputs: Inputs, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        canaries = (labels - self.classes).tolist()
        places = [place for place, canary in enumerate(canaries) if canary >= 0]
        if not places:
            return super().gradients(inputs, labels)
        others = torch.tensor(
            [place for place, canary in enumerate(canaries) if canary < 0], device=labels.device, dtype=torch.long
        )
        active = {name: p for name, p in self.adapter.parameters.items() if p.requires_grad}
        found = {name: p.new_zeros(len(labels), p.numel()) for name, p in active.items()}
        losses = torch.zeros(len(labels), device=labels.device)
        if len(others):
            own, losses_of = super().gradients(rows(inputs, others), labels[others])
            losses[others] = losses_of.to(losses.dtype)
            for name, value in own.items():
                found[name][others] = value.flatten(1).to(found[name].dtype)
        for place in places:
            where = {name: direction(canaries[place], self.count, p.numel()) for name, p in active.items()}
            entries = sum(len(range(*where[name].indices(p.numel()))) for name, p in active.items())
            for name in active:
                found[name][place, where[name]] = self.length / math.sqrt(max(1, entries))
        return {name: value.view(len(labels), *active[name].shape) for name, value in found.items()}, losses


class PlantedLearners(LearnerCache):
    """Makes the run's learners with gradient canaries' gradients."""

    def __init__(self, models: ModelStore, pool: Pool, length: float) -> None:
        super().__init__(models)
        self._about = (pool.classes, pool.gradients, length)

    def learner(self, settings: Settings, device: str = "") -> Learner:
        own = super().learner(settings, device)
        return PlantedLearner(own.base, own.adapter, own.engine, own.initial, *self._about)


def projections(learner: Learner, pool: Pool) -> NDArray[np.float64]:
    """How far the loaded adapter went against the gradient of each gradient canary, in the order of the pool."""
    moved = {
        name: (learner.initial[name] - value).double().flatten().numpy()
        for name, value in learner.adapter.state().items()
        if name in learner.adapter.trainable and learner.initial[name].shape == value.shape
    }
    found = np.zeros(pool.gradients)
    for place, canary in enumerate(pool.numbers()):
        entries = [value[direction(int(canary), pool.gradients, len(value))] for value in moved.values()]
        total = sum(len(own) for own in entries)
        found[place] = sum(float(own.sum()) for own in entries) / math.sqrt(max(1, total))
    return found
