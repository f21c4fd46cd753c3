"""σ for a wanted ε, and ε for steps taken: Poisson-subsampled Gaussian steps, by Opacus' accountants.

Adjacency is add/remove of one record. PRV (arXiv 2106.02848) is the headline; RDP is looser by 5-25 % and serves as a
cross-check. The GDP accountant is left out: it can understate ε.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

from lalora_flwr.errors import ConfigError

Segment = tuple[float, float, int]  # noise multiplier σ, sample rate q, number of steps


_FINE, _COARSE = 0.001, 0.01  # PRV adds its error bound to ε; at a small ε the fine one is worth its time


def _options(accountant: str, eps_error: float) -> dict[str, float]:
    return {"eps_error": eps_error} if accountant == "prv" else {}


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Opacus' import sets up the root logger, which would then repeat every line of a site's log."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


@lru_cache(maxsize=4096)
def _epsilon(history: tuple[Segment, ...], delta: float, accountant: str, eps_error: float) -> float:
    with _root_logger_kept():
        from opacus.accountants import create_accountant

    counter = create_accountant(accountant)
    counter.history = list(history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # RDP's advice to widen its list of orders; the bound holds without
        return float(counter.get_epsilon(delta, **_options(accountant, eps_error)))


def epsilon_spent(history: Sequence[Segment], delta: float, accountant: str = "prv") -> float:
    """ε at δ of all steps in the history, composed (not summed); 0 for none; inf if a step had no noise.

    Guarantee: an upper bound on the privacy loss of the composition, for one record added to or removed from the site,
    if each step included each record independently with its probability q and added N(0, σ²C²) to the clipped sum.

    Args:
        history: (σ, q, steps) segments.
        delta: δ of the guarantee.
        accountant: ``prv`` or ``rdp``.
    """
    steps = tuple(segment for segment in history if segment[2])
    if not steps:
        return 0.0
    if any(sigma == 0 for sigma, _, _ in steps):
        return math.inf
    coarse = _epsilon(steps, delta, accountant, _COARSE)
    return coarse if coarse > 1.1 or accountant != "prv" else min(coarse, _epsilon(steps, delta, accountant, _FINE))


@lru_cache(maxsize=256)
def noise_multiplier_for(epsilon: float, delta: float, sample_rate: float, steps: int, accountant: str = "prv") -> float:
    """The smallest σ, to a tolerance of 1 % in ε, whose ``steps`` steps cost at most ε at δ; 0 for ε = inf.

    Args:
        epsilon: the whole budget of the site.
        delta: δ of the guarantee.
        sample_rate: q, each record's probability of being in a step's batch.
        steps: the most steps the site may take.
        accountant: ``prv`` or ``rdp``.

    Raises:
        ConfigError: if no noise level reaches ε.
    """
    with _root_logger_kept():
        from opacus.accountants.utils import get_noise_multiplier

    if math.isinf(epsilon):
        return 0.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(
                get_noise_multiplier(
                    target_epsilon=epsilon,
                    target_delta=delta,
                    sample_rate=sample_rate,
                    steps=steps,
                    accountant=accountant,
                    epsilon_tolerance=min(0.01, 0.01 * epsilon),
                    **_options(accountant, _FINE if epsilon <= 1 else _COARSE),
                )
            )
    except (ValueError, RuntimeError, MemoryError, OverflowError):
        raise ConfigError(
            f"privacy.epsilon = {epsilon:g}: no noise level found for δ = {delta:g}, sample rate {sample_rate:.3g} and "
            f"{steps} steps; choose a larger ε, or inf to train without privacy"
        ) from None
