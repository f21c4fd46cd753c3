"""How good the sites' own models are, where slots stay at the sites: for a simulation only, whose process holds all of them."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import ArrayRecord

from lalora_flwr.data.records import RecordSet
from lalora_flwr.server.metrics import Quality
from lalora_flwr.site.memory import kept_from
from lalora_flwr.training.evaluate import evaluate
from lalora_flwr.training.learner import Learner

IN_SIMULATION = "mean over the sites' own models on the public test records; known in a simulation only"


def personal_quality(learner: Learner, records: RecordSet, memories: Mapping[int, ArrayRecord]) -> Quality:
    """Mean quality, each site alike, of the learner's adapter with what stayed at a site in place of its own slots.

    Args:
        learner: holds the adapter that the sites share, and again when this returns.
        records: public ones.
        memories: of virtual sites, by number; those that hold no slots are left out.

    Returns:
        Nothing if no slots stayed at any site. None in place of a metric that is not finite for one of them.
    """
    common = learner.adapter.state()
    found = []
    for _, memory in sorted(memories.items()):
        if own := kept_from(memory):
            learner.adapter.load({**common, **own})
            found.append(evaluate(learner, records))
    learner.adapter.load(common)
    return {name: _mean([one[name] for one in found]) for name in found[0]} if found else {}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(values) if len(known) == len(values) else None
