"""What the process that runs a site hands to it. No message can set any of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType

from lalora_flwr.privacy.mechanism import PrivateSum
from lalora_flwr.privacy.randomness import RandomSource, SeededRandom, SystemRandom
from lalora_flwr.site.records import ReadRecords, RecordStore
from lalora_flwr.training.learner import LearnerCache, ModelStore
from lalora_flwr.training.local import MakeSum


@dataclass(frozen=True)
class Host:
    """The surroundings of the sites of one process.

    Guarantee: the privacy of a real site rests on the defaults: fresh entropy of the operating system, the mechanism of
    `PrivateSum`, and the records of its owner. Other values are for simulations, audits and tests, which hand them in.

    Attributes:
        simulated: its sites are virtual: whoever started the process holds all records, noise follows from the run's seed,
            and there need be no ledger.
        learners: makes the model that its sites train, one after the other.
        records: reads a site's records.
        entropy: makes the random source of a real site's round.
        seeded: makes that of a virtual site's, from the run's seed, the site, the round and the attempt.
        make_sum: makes what clips, adds and noises the gradients of a step.
    """

    simulated: bool
    learners: LearnerCache = field(default_factory=lambda: LearnerCache(ModelStore()))
    records: ReadRecords = field(default_factory=RecordStore)
    entropy: Callable[[], RandomSource] = SystemRandom
    seeded: Callable[[int, int, int, int], RandomSource] = SeededRandom
    make_sum: MakeSum = PrivateSum


def in_ray_worker(modules: Mapping[str, ModuleType] = sys.modules) -> bool:
    """Whether Flower's simulation runtime made this process: Ray is at work in it, as it never is on a SuperNode.

    ``modules``: those that the process has imported.
    """
    ray = modules.get("ray")
    return bool(ray is not None and ray.is_initialized())
