"""What a round's updates say of themselves: how much of them is signal, whether sites agree, how the steps of A and B meet.

For the layers that have both factors, with the start A (r, n), B (m, r) of the round and the mean moves a, b:

    snr               (‖mean update‖² - E) / E,  E being the energy that its noise is expected to have
    cosine_A, _B      mean inner product of two sites' updates of the part over the mean squared length of one
    coupling          cosine, over all layers together, of B a and b A: what the move of either does to the product B A
    cross_term        ‖b a‖ / ‖B a + b A‖: what is left over because both moved
    aggregation_bias  ‖mean(B_i A_i) - mean(B) mean(A)‖ / ‖mean(B) mean(A)‖ = ‖mean((B_i - mean B)(A_i - mean A))‖ / …

No product (m, n) is formed: ‖X Y‖² is the sum of the entries of (XᵀX) ∘ (Y Yᵀ), of the size of what X and Y share.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lalora_flwr.adapter.slots import LORA_A, LORA_B, Layout, Slot, factors_of
from lalora_flwr.methods.filters import Around, Filter, State
from lalora_flwr.methods.method import Method
from lalora_flwr.methods.updates import Tensors, Updates
from lalora_flwr.server.round_signals import Signals
from lalora_flwr.settings import Settings
from lalora_flwr.training.rate import rate_for
from lalora_flwr.wire.public import Public

Array = NDArray[np.float64]
DRAWN = 1 << 14  # entries of white noise at least that a filter's share is measured on


@dataclass(frozen=True)
class Round:
    """Where the updates stand: public facts of the round.

    Attributes:
        settings, method, layout: of the run.
        server_round, directive: of the round.
        noise: standard deviation of the noise on an entry of the mean gradient of the sites that served; 0: none, or not known.
        sites: how many served.
        alike: whether all took the run's own number of steps.
    """

    settings: Settings
    method: Method
    layout: Layout
    server_round: int
    directive: Public
    noise: float
    sites: int
    alike: bool = True


def signals_of(now: Round, start: Tensors, updates: Updates) -> Signals:
    """The signals of a round.

    Guarantee: post-processing of what sites released, and of public constants.

    Args:
        now: the round.
        start: the adapter that it started from, every slot of it.
        updates: as the transport shows them.

    Returns:
        None for what there is not: of single updates under a transport that hides them, of the noise where an update is more
        than a sum of noised gradients (`noise_energy`), of all where sites hold different shapes or train different slots.
    """
    times = trained_times(now)
    kept = now.method.travel.kept(now.layout)
    names = [name for name in now.layout if times[name] and name not in kept]
    if updates.known is not None and any(not _whole(update.tensors, now.layout, names) for update in updates.known):
        return Signals()
    energies = noise_energy(now, times)
    grams, lengths, noise = dict[str, Array](), dict[str, float](), dict[str, float]()
    mean: dict[str, Array] = {}
    apart: dict[str, Array] = {}
    for name in names:
        part, size = now.layout[name].part, math.prod(now.layout[name].shape)
        origin = np.zeros(size) if now.method.server_steps else start[name].reshape(size).astype(np.float64)
        if updates.known is None:
            mean[name] = updates.total[name].reshape(size) / updates.count - origin
        else:
            moved = np.stack([update.tensors[name].reshape(size) for update in updates.known]) - origin
            mean[name] = moved.mean(axis=0)
            grams[part] = grams.get(part, 0.0) + moved @ moved.T
            apart[name] = moved - mean[name]
        lengths[part] = lengths.get(part, 0.0) + float(mean[name] @ mean[name])
        if energies:
            noise[part] = noise.get(part, 0.0) + energies[name]
    moves = {name: value.reshape(now.layout[name].shape) for name, value in mean.items()}
    coupling, cross = _meeting(now.layout, start, moves)
    return Signals(
        snr=_ratio(sum(lengths.values()) - sum(noise.values()), sum(noise.values())),
        snr_A=_ratio(lengths.get(LORA_A, 0.0) - noise.get(LORA_A, 0.0), noise.get(LORA_A, 0.0)),
        snr_B=_ratio(lengths.get(LORA_B, 0.0) - noise.get(LORA_B, 0.0), noise.get(LORA_B, 0.0)),
        cosine_A=_agreement(grams.get(LORA_A)),
        cosine_B=_agreement(grams.get(LORA_B)),
        coupling=coupling,
        cross_term=None if now.method.server_steps else cross,
        aggregation_bias=None if updates.known is None or now.method.server_steps else _bias(now.layout, start, moves, apart),
    )


def _whole(tensors: Tensors, layout: Layout, names: list[str]) -> bool:
    return all(name in tensors and tensors[name].shape == layout[name].shape for name in names)


def trained_times(now: Round) -> dict[str, int]:
    """In how many of the round's steps each slot trains."""
    steps = now.settings.train.local_steps
    masks = now.method.schedule.masks(now.layout, now.server_round, steps, now.directive)
    return {name: sum(name in masks[step % len(masks)] for step in range(steps)) for name in now.layout}


def unknown_steps(settings: Settings, method: Method) -> str:
    """Which key makes steps more than a sum of filtered gradients times the rate; empty if none does."""
    train = settings.train
    if train.optimizer != "sgd":
        return f"train.optimizer = {train.optimizer!r}"
    if train.momentum or train.weight_decay:
        return f"train.momentum = {train.momentum:g}" if train.momentum else f"train.weight-decay = {train.weight_decay:g}"
    return f"filter.name = {method.filter.name!r}" if method.filter.remembers else ""


def unknown_noise(settings: Settings, method: Method) -> str:
    """Which key makes it unknown how much of an update is noise; empty if none does. Gradients are as they were released."""
    if not settings.private:
        return "privacy.epsilon = inf"
    return "" if method.server_steps else unknown_steps(settings, method)


def noise_energy(now: Round, times: Mapping[str, int]) -> dict[str, float]:
    """E of the mean update of each slot: the expected ‖noise‖² in it, from public constants.

    An update of k steps at the rate η along gradients with noise ν has η² ν² k for each entry, and of that what the filter
    keeps; of gradients it is ν². Exact for one step; of several it leaves out that later gradients answer to earlier noise.

    Returns:
        Nothing if there is no noise or it is not known (`unknown_noise`).
    """
    if not now.noise or not now.alike or unknown_noise(now.settings, now.method):
        return {}
    if now.method.server_steps:
        return {name: now.noise**2 * math.prod(now.layout[name].shape) for name, count in times.items() if count}
    kept = {name: kept_by(now.method.filter, now.layout[name]) for name, count in times.items() if count}
    if None in kept.values():
        return {}
    rate = rate_for(now.settings, now.method, now.layout, now.noise * math.sqrt(now.sites / now.settings.sites_per_round))
    each = (rate * now.noise) ** 2
    return {name: each * times[name] * math.prod(now.layout[name].shape) * (share or 0.0) for name, share in kept.items()}


@functools.lru_cache(maxsize=4096)
def kept_by(filter: Filter, slot: Slot) -> float | None:
    """Share of the energy of white noise that a filter leaves, measured on noise of a fixed seed; None if it is not linear."""
    if not filter.keeps:  # it looks at more than the gradient
        return None
    generator = torch.Generator().manual_seed(0)

    def white() -> torch.Tensor:
        return torch.randn(slot.shape, generator=generator)

    x, y = white(), white()
    if (filtered := _through(filter, slot, x)) is x:
        return 1.0
    if not torch.allclose(_through(filter, slot, 2 * x + y), 2 * filtered + _through(filter, slot, y), rtol=1e-3, atol=1e-4):
        return None
    before = after = 0.0
    for _ in range(max(2, math.ceil(DRAWN / math.prod(slot.shape)))):
        x = white()
        before += float(x.double().square().sum())
        after += float(_through(filter, slot, x).double().square().sum())
    return after / before


def _through(filter: Filter, slot: Slot, x: torch.Tensor) -> torch.Tensor:
    nothing: State = {}
    return filter(slot, x, nothing, Around(1.0))


def _ratio(value: float, over: float) -> float | None:
    return value / over if over > 0 else None


def _agreement(gram: Array | None) -> float | None:
    """From the inner products of the sites' updates: those of two over those of one with itself."""
    if gram is None or len(gram) < 2:
        return None
    own, count = float(np.trace(gram)), len(gram)
    return _ratio((float(gram.sum()) - own) / (count * (count - 1)), own / count)


def _meeting(layout: Layout, start: Tensors, moves: Mapping[str, Array]) -> tuple[float | None, float | None]:
    """`coupling` and `cross_term`; None if no layer moved in both factors, or one of them not at all."""
    by_A = by_B = both = cross = 0.0
    for name_A, name_B in factors_of(layout):
        if name_A in moves and name_B in moves:
            A, B = start[name_A].astype(np.float64), start[name_B].astype(np.float64)
            a, b = moves[name_A], moves[name_B]
            aa, bb = a @ a.T, b.T @ b  # (r, r)
            by_A += float(((B.T @ B) * aa).sum())
            by_B += float((bb * (A @ A.T)).sum())
            both += float(((B.T @ b) * (a @ A.T)).sum())
            cross += float((bb * aa).sum())
    linear = max(0.0, by_A + by_B + 2 * both)
    return _ratio(both, math.sqrt(by_A * by_B)), _ratio(math.sqrt(cross), math.sqrt(linear)) if cross else None


def _bias(layout: Layout, start: Tensors, moves: Mapping[str, Array], apart: Mapping[str, Array]) -> float | None:
    """`aggregation_bias`; 0 if no layer moved in both factors, None if there are no layers with both or their product is zero."""
    off = product = 0.0
    for name_A, name_B in factors_of(layout):
        mean_A, mean_B = (start[name] + moves.get(name, 0.0) for name in (name_A, name_B))
        product += float(((mean_B.T @ mean_B) * (mean_A @ mean_A.T)).sum())
        if name_A in apart and name_B in apart:
            sites, (rank, width) = len(apart[name_A]), mean_A.shape
            stacked_A = apart[name_A].reshape(sites * rank, width)
            stacked_B = apart[name_B].reshape(sites, -1, rank).transpose(1, 0, 2).reshape(-1, sites * rank)
            off += float(((stacked_B.T @ stacked_B) * (stacked_A @ stacked_A.T)).sum()) / sites**2
    return _ratio(math.sqrt(max(0.0, off)), math.sqrt(product))
