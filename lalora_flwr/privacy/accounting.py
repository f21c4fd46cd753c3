"""σ for a wanted ε, and ε for steps taken: Poisson-subsampled Gaussian steps, composed.

Adjacency is add/remove of one record. The accountants:

- ``pld``, the headline: privacy loss distributions composed by Fourier transform (`composition`); tight, and cheap.
- ``rdp``: Opacus' Rényi accountant; 5-25 % looser, of another construction, hence the cross-check.
- ``prv``: Opacus' PRV accountant (arXiv 2106.02848), slow; for the entries that ledgers made with it hold.

The GDP accountant is left out: it can understate ε.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
from scipy.special import ndtr

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.privacy.composition.memory import Compositions
from lalora_flwr.privacy.events import SampledGaussian
from lalora_flwr.privacy.kept import Calibrations

HEADLINE = "pld"

_PRV_FINE, _PRV_COARSE = 0.001, 0.01  # PRV adds its error bound to ε; at a small ε the fine one is worth its time
_PRV_SMALLEST_DELTA = 1e-12  # below, it understates ε
_MOST_NOISE, _LEAST_NOISE = 1e6, 0.01
_GOAL, _TOLERANCE = 0.998, 0.995  # a calibrated σ costs this share of the wanted ε, at least that

_compositions = Compositions()
CALIBRATIONS = Calibrations()  # of this process; nothing is read from a disk unless an engine of simulations opens it


def epsilon_spent(history: Sequence[SampledGaussian], delta: float, accountant: str = HEADLINE) -> float:
    """ε at δ of all steps in the history, composed (not summed); 0 for none; inf if a step had no noise.

    Guarantee: an upper bound on the privacy loss of the composition, for one record added to or removed from the site,
    if each step included each record independently with its probability q and added N(0, σ²C²) to the clipped sum.

    Args:
        history: steps, in any order.
        delta: δ of the guarantee.
        accountant: ``pld``, ``rdp`` or ``prv``.

    Raises:
        ConfigError: ``prv`` at a δ at which it understates ε.
        ValueError: if δ is not between 0 and 1, or some are not steps of the mechanism (``pld``).
    """
    if accountant == HEADLINE:
        return _compositions.epsilon(history, delta)
    steps = tuple(segment for segment in history if segment[2])
    if not steps:
        return 0.0
    if any(sigma == 0 for sigma, _, _ in steps):
        return math.inf
    return max(0.0, {"rdp": _rdp, "prv": _prv}[accountant](steps, delta))


@contextmanager
def _quiet() -> Iterator[None]:
    """Opacus' import sets up the root logger, which would repeat every line of a site's log; RDP warns of its orders."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to widen the list of orders; the bound holds without
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


@lru_cache(maxsize=4096)
def _rdp_of_step(sigma: float, q: float) -> np.ndarray:
    with _quiet():
        from opacus.accountants import RDPAccountant
        from opacus.accountants.analysis.rdp import compute_rdp

        return np.asarray(compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=RDPAccountant.DEFAULT_ALPHAS))


def _rdp(history: tuple[SampledGaussian, ...], delta: float) -> float:
    with _quiet():
        from opacus.accountants import RDPAccountant
        from opacus.accountants.analysis.rdp import get_privacy_spent

        rdp = sum(steps * _rdp_of_step(sigma, q) for sigma, q, steps in history)
        epsilon, _ = get_privacy_spent(orders=RDPAccountant.DEFAULT_ALPHAS, rdp=rdp, delta=delta)
    return float(epsilon)


def _prv(history: tuple[SampledGaussian, ...], delta: float) -> float:
    if delta < _PRV_SMALLEST_DELTA:
        raise ConfigError(f"δ = {delta:g}: the PRV accountant understates ε below {_PRV_SMALLEST_DELTA:g}; use pld")
    coarse = _prv_epsilon(history, delta, _PRV_COARSE)
    return coarse if coarse > 1.1 else min(coarse, _prv_epsilon(history, delta, _PRV_FINE))


@lru_cache(maxsize=4096)
def _prv_epsilon(history: tuple[SampledGaussian, ...], delta: float, eps_error: float) -> float:
    with _quiet():
        from opacus.accountants import PRVAccountant

        counter = PRVAccountant()
        counter.history = list(history)
        return float(counter.get_epsilon(delta, eps_error=eps_error))


@lru_cache(maxsize=2**16)  # one for each size of a site
def noise_multiplier_for(
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: str = HEADLINE,
    before: tuple[SampledGaussian, ...] = (),
) -> float:
    """The σ, to a tolerance of 0.5 % in ε, whose ``steps`` steps cost at most ε at δ; 0 for ε = inf.

    Guarantee: `epsilon_spent` of all the steps, and those ``before``, is at most ε. That is computed here, by the accountant,
    also for a σ that a simulation's process finds on its disk (`lalora_flwr.privacy.kept`).

    Args:
        epsilon: the whole budget of the site.
        delta: δ of the guarantee.
        sample_rate: q, each record's probability of being in a step's batch.
        steps: the most steps the site may take.
        accountant: ``pld``, ``rdp`` or ``prv``.
        before: other steps that the budget is also for.

    Raises:
        ConfigError: if no noise level reaches ε.
    """
    if math.isinf(epsilon):
        return 0.0
    question = (epsilon, delta, sample_rate, steps, accountant, before)
    kept = CALIBRATIONS.get(question)
    if kept is not None and _keeps_to(kept, *question):
        return kept
    try:
        sigma = _search(epsilon, delta, sample_rate, steps, accountant, before)
    except (ValueError, RuntimeError, MemoryError, OverflowError):
        sigma = None
    if sigma is None:
        raise ConfigError(
            f"privacy.epsilon = {epsilon:g}: no noise level found for δ = {delta:g}, sample rate {sample_rate:.3g} and "
            f"{steps} steps; choose a larger ε, or inf to train without privacy"
        )
    CALIBRATIONS.put(question, sigma)
    return sigma


def _keeps_to(
    sigma: float, epsilon: float, delta: float, q: float, steps: int, accountant: str, before: tuple[SampledGaussian, ...]
) -> bool:
    """Whether a σ that was found before costs at most ε, and not much less: one composition in place of a search."""
    if not _LEAST_NOISE <= sigma <= _MOST_NOISE:
        return False
    try:
        spent = epsilon_spent([*before, SampledGaussian(sigma, q, steps)], delta, accountant)
    except (ValueError, RuntimeError, MemoryError, OverflowError):
        return False
    return _TOLERANCE * epsilon <= spent <= epsilon


def _search(
    epsilon: float, delta: float, q: float, steps: int, accountant: str, before: tuple[SampledGaussian, ...]
) -> float | None:
    """By secants of log ε over log σ, from the central limit; None if the largest σ is not enough."""
    least, most = math.log(_LEAST_NOISE), math.log(_MOST_NOISE)
    goal = math.log(_GOAL * epsilon)
    low: tuple[float, float] | None = None  # log σ, log ε: too little noise
    high: tuple[float, float] | None = None  # enough
    x = min(max(math.log(_central_limit(epsilon, delta, q, steps)), least), most)
    for _ in range(100):
        spent = epsilon_spent([*before, SampledGaussian(math.exp(x), q, steps)], delta, accountant)
        if spent <= epsilon:
            if spent >= _TOLERANCE * epsilon or x <= least:
                return math.exp(x)
            high = x, math.log(max(spent, 1e-3 * epsilon))
        elif x >= most:
            return None
        else:
            low = x, math.log(min(spent, 1e3 * epsilon))
        if low and high:
            if high[0] - low[0] < 1e-9:  # ε jumps here
                return math.exp(high[0])
            share = (low[1] - goal) / (low[1] - high[1])
            x = low[0] + (high[0] - low[0]) * min(max(share, 0.05), 0.95)
        elif known := low or high:  # ε falls a little faster than σ grows
            x = min(max(x + min(max(known[1] - goal, -1.0), 1.0), least), most)
    return None if high is None else math.exp(high[0])


def _central_limit(epsilon: float, delta: float, q: float, steps: int) -> float:
    """The σ at which many steps are about as private as one Gaussian step (arXiv 1911.11607): a guess, no bound."""
    low, high = 1e-6, 1e3  # of mu, the one step's 1 / σ
    for _ in range(60):
        mu = math.sqrt(low * high)
        found = ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon) * ndtr(-mu / 2 - epsilon / mu)
        low, high = (mu, high) if found < delta else (low, mu)
    return 1 / math.sqrt(math.log1p((low / q) ** 2 / steps))
