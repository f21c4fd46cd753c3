"""How long an honest site's update can be: a public bound from clip, noise, rate and steps. Who is beyond it is left out.

    a gradient                   C M(1) + ν L(the entries of the step)
    K steps of SGD               η c (C M(K) + ν L(each entry as often as it trains))
    through a filter             η c K f √p (C M(1) + ν L(the entries of a step))
    K steps of AdamW             η K 7.3 √d
    weight decay λ, from w       (the above + ηcKλ ‖w‖) exp(ηcKλ)

C: clip norm;  b: expected batch;  ν = σC / b;  c = 1 + μ + … + μ^(K-1) of the momentum μ;  f: what the filter stretches;  p:
parts, whose filters remember other steps. M(K) b is the most records that K steps draw, and L the most that normal draws are long
together, but for a chance of e^-t = 10⁻⁹ each, so that an honest site is not left out once in 10⁸ rounds:

    M(K) b = m + √(2 m t) + t/3  with  m = 2Kb  (Bennett's inequality for Poisson draws; twice the records declared)
    L² = Σ v + 2 √(t Σ v²) + 2 t max v,  v: the variances  (Laurent and Massart 2000, Lemma 1)

AdamW moves no entry by more than η (1 - β₁) / √((1 - β₂) (1 - β₁² / β₂)) in a step, by Cauchy and Schwarz. Where all records of a
site take part in a step, how many they are is not known: its noise is taken for that of one record.

Guarantee: of public constants, and of what the site says of its noise and its sampling, which `SiteCounts` has checked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lalora_flwr.adapter.slots import Layout, Mask
from lalora_flwr.methods.filters import NONE
from lalora_flwr.methods.method import Method
from lalora_flwr.settings import Settings
from lalora_flwr.training.rate import rate_for
from lalora_flwr.wire.replies import Counters

TAIL = math.log(1e9)  # t
ROUNDING = 1.001  # of float32 sums
MORE_RECORDS = 2.0  # than declared, at most
ADAMW = 7.3
MOST_DECAY = 700.0  # of which exp is a float


@dataclass(frozen=True)
class Sends:
    """What a site sends of a round.

    Attributes:
        whole: the slots as the server holds them.
        held: as the site does.
        masks: what trains at each of its steps, those that it sends; where they are fewer they repeat.
        start: L2 norm of what it was sent of them.
    """

    whole: Layout
    held: Layout
    masks: Sequence[Mask]
    start: float


def longest_draw(entries: Mapping[float, int], tail: float = TAIL) -> float:
    """L; ``entries``: how many there are of each variance."""
    total = sum(variance * count for variance, count in entries.items())
    squares = sum(variance**2 * count for variance, count in entries.items())
    return math.sqrt(total + 2 * math.sqrt(tail * squares) + 2 * tail * max(entries, default=0.0))


def most_drawn(steps: int, batch: float, tail: float = TAIL) -> float:
    """M: records that are drawn in so many steps, in expected batches."""
    mean = MORE_RECORDS * steps * batch
    return (mean + math.sqrt(2 * mean * tail) + tail / 3) / batch


def longest_update(settings: Settings, method: Method, sends: Sends, counters: Counters) -> float:
    """The bound on the L2 norm of an update; inf where there is none: without privacy, or for a filter that knows none.

    Args:
        settings: the run's as the site serves them.
        method: the run's.
        sends: what the site sends.
        counters: of its reply, checked.
    """
    if not counters.noise_multiplier:
        return math.inf
    train, clip_norm, batch = settings.train, settings.privacy.clip_norm, float(settings.train.batch_size)
    all_of_them = counters.sample_rate == 1
    noise = counters.noise_multiplier * clip_norm
    nu, steps = noise if all_of_them else noise / batch, 1 if method.server_steps else train.local_steps
    rate, walk = 1.0, nu  # of the server's step, which is not the site's
    if not method.server_steps:
        sites = math.sqrt(settings.sites_per_round)
        rate = rate_for(settings, method, sends.whole, noise / batch / sites)  # a smaller ν has a larger one
        walk = nu * rate_for(settings, method, sends.whole, nu / sites)

    def gradients(of_steps: int, entries: Mapping[float, int], tail: float = TAIL) -> float:
        records = MORE_RECORDS * of_steps if all_of_them else most_drawn(of_steps, batch, tail)
        return rate * clip_norm * records + walk * longest_draw(entries, tail)

    masks = [sends.masks[step % len(sends.masks)] for step in range(steps)]
    widest = max(_size(sends.held, mask) for mask in masks)
    if method.server_steps:
        return ROUNDING * gradients(1, {1.0: widest})
    longer = (1 - train.momentum**steps) / (1 - train.momentum)
    if train.optimizer == "adamw":
        length, longer = rate * steps * ADAMW * math.sqrt(widest), 1.0
    elif method.filter is NONE:
        length = longer * gradients(steps, _times(sends.held, masks))
    else:
        parts = max(len({sends.held[name].part for name in mask}) for mask in masks)
        tail = TAIL + math.log(steps * settings.num_rounds)  # it may remember any step of the run
        length = longer * steps * method.filter.stretch * math.sqrt(parts) * gradients(1, {1.0: widest}, tail)
    decay = rate * longer * steps * train.weight_decay
    return ROUNDING * (length + decay * sends.start) * math.exp(min(decay, MOST_DECAY))


def _size(layout: Layout, names: Mask) -> int:
    return sum(math.prod(layout[name].shape) for name in names)


def _times(layout: Layout, masks: Sequence[Mask]) -> dict[float, int]:
    """How many entries train how often."""
    found: dict[float, int] = {}
    for name in layout:
        if times := sum(name in mask for mask in masks):
            found[float(times)] = found.get(float(times), 0) + math.prod(layout[name].shape)
    return found
