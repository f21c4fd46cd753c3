"""The learning rate of a run that names none (``train.lr = 0``): from the noise, so that nobody tunes it on private records.

An entry of the mean gradient of a step carries noise of standard deviation ν, which the mechanism says. After T steps along it at
the rate η, the noise has moved the entry by η ν √T. For each kind of tensor there is a length of this walk at which the accuracy
on the embedded digits is best, whatever ε, the number of sites and who adds the noise:

    η = min over the kinds that train of  WALK / (ν √T),  T being the steps in which the kind trains;
        at most MOST / C, since a clipped gradient is no longer than C, or MOST_WITH_A / C;  without privacy PLAIN

A form or a merge may stretch the walk (`AdapterForm.stride`, `Merge.stride`): half as long where two matrices in a row move.

A momentum makes steps longer and a filter shorter; the rate makes up for both, of each kind by the slot that the filter smooths
least. A filter over time spreads noise over steps and leaves the walk as long; one whose gain depends on the gradients is not
made up for (`Filter.keeps`). The bounds by C are not raised for a filter: what it leaves through goes as far as before.
`docs/results.md` has what the rule loses against tuned rates on other tasks.
"""

from __future__ import annotations

import math
from functools import lru_cache

from lalora_flwr.adapter.slots import LORA_A, Layout, Mask
from lalora_flwr.methods.merges import Merge
from lalora_flwr.methods.method import Method
from lalora_flwr.methods.schedules import MOST_LOOKED_AT, Schedule
from lalora_flwr.privacy.mechanism import Mechanism
from lalora_flwr.settings import Settings

WALK_A = 0.1  # of lora_A, which the noise of B is multiplied with
WALK = 0.3  # of all else
WALK_AVERAGED = 0.42  # of all else where the adapters of the rounds are averaged
MOST, MOST_WITH_A = 8.0, 2.0  # over C; beyond it steps overshoot even where there is little noise
LARGEST = 100.0  # at all; an owner's range of rates ends there if nothing else is said
PLAIN = 0.3  # without privacy, where nothing bounds a gradient


def noise_at_one(mechanism: Mechanism) -> float:
    """ν of a single site's mean gradient."""
    return mechanism.noise_std / mechanism.expected_batch


def noise_at_all(mechanism: Mechanism, sites: int) -> float:
    """ν of the mean over as many sites, each of which adds this noise."""
    return noise_at_one(mechanism) / math.sqrt(sites)


def rate_for(settings: Settings, method: Method, layout: Layout, noise: float) -> float:
    """``train.lr``, or what the rule says if it is 0.

    Guarantee: of public constants alone.

    Args:
        settings: of the run.
        method: of the run.
        layout: the slots of its adapter.
        noise: ν of the mean over all sites of a round.
    """
    train = settings.train
    if train.lr:
        return train.lr
    if method.own_rate:
        return method.own_rate
    with_a, others = _steps(settings, method, layout)
    of_a, ever = layout.of(LORA_A), method.schedule.ever(layout)
    shorter_a, shorter = _made_up(settings, method, layout, ever & of_a), _made_up(settings, method, layout, ever - of_a)
    least = min(shorter_a if with_a else math.inf, shorter if others else math.inf)
    if not noise:
        return PLAIN * least
    bound = min(MOST, MOST_WITH_A / _scale(method, layout, ever & of_a)) if with_a else MOST
    rate = min(bound / settings.privacy.clip_norm / _longer(settings, method), LARGEST)
    if with_a:
        rate = min(rate, method.merge.stride_A * WALK_A / (noise * math.sqrt(with_a)) * shorter_a)
    if others:
        walk = method.form_of.stride * method.merge.stride * (WALK_AVERAGED if method.average else WALK)
        rate = min(rate, walk / (noise * math.sqrt(others)) * shorter)
    return rate


def _made_up(settings: Settings, method: Method, layout: Layout, slots: Mask) -> float:
    """What the rate of some slots is multiplied with, for the momentum and for the filter of the one that it smooths least."""
    kept = max((method.filter.kept(layout[name]) for name in slots), default=1.0)
    return 1 / (_longer(settings, method) * math.sqrt(kept))


def _scale(method: Method, layout: Layout, slots: Mask) -> float:
    """The largest length of the slots' steps, in units of those without the filter."""
    return max(method.filter.scale(layout[name]) for name in slots)


def _longer(settings: Settings, method: Method) -> float:
    """How many times longer momentum makes a step, in the mean over those between which an optimizer remembers."""
    mu, steps = settings.train.momentum, settings.num_rounds if method.server_steps else settings.train.local_steps
    return (1 - mu * (1 - mu**steps) / ((1 - mu) * steps)) / (1 - mu)


def _steps(settings: Settings, method: Method, layout: Layout) -> tuple[float, float]:
    """The steps of the run in which some lora_A trains, and those in which something else does."""
    first, rounds = 1 + settings.ridge_first, settings.num_rounds - settings.ridge_first
    return _counted(method.schedule, method.merge, layout, first, rounds, settings.train.local_steps)


@lru_cache(maxsize=16)  # every site asks in every round
def _counted(schedule: Schedule, merge: Merge, layout: Layout, first: int, rounds: int, steps: int) -> tuple[float, float]:
    own, directive = layout.of(LORA_A), merge.start(layout)
    with_a, others, seen = 0, 0, min(rounds, MOST_LOOKED_AT)
    for server_round in range(first, first + seen):
        foreseen = schedule.foreseen(layout, server_round, directive)
        masks = schedule.masks(layout, server_round, steps, foreseen)
        for step in range(steps):
            mask = masks[step % len(masks)]
            with_a += bool(mask & own)
            others += bool(mask - own)
    return with_a * rounds / seen, others * rounds / seen
