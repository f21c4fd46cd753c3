"""What scores of canaries inside and outside say of ε: three lower bounds, of which the first decides.

- `clopper_pearson`: how well thresholds separate the two, with exact binomial limits, against the curve of the claimed mechanism.
  Valid for independent canaries, as orthogonal ones are; the thresholds come from a simulation, never from the scores.
- `gaussian_pair`: the two sets of scores as two Gaussians (arXiv 2606.12733). Nearer to ε, but asymptotic: an estimate.
- `one_run`: guesses about all canaries at once (Steinke et al., arXiv 2305.08846). Valid for dependent canaries, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr
from scipy.stats import beta, binom, norm

from lalora_flwr.privacy.accounting import epsilon_spent
from lalora_flwr.privacy.events import SampledGaussian

Scores = NDArray[np.float64]
MOST_EPSILON = 200.0
SIMULATED = 20_000  # canaries of each kind, for a mechanism's curve
ALARMS = (0.4, 0.15, 0.03)  # shares of those outside
SUSPECTED = (1.0, 0.5, 0.2)  # shares of the noise that there might be: a test for each


def log_likelihood_ratio(projections: Scores, sigma: float, q: float) -> Scores:
    """log of how much likelier a canary's projection, over C, is with it among the records than without, for one step."""
    exponent = (projections - 0.5) / sigma**2
    if q == 1:
        return exponent
    found: Scores = np.logaddexp(math.log1p(-q), math.log(q) + exponent)
    return found


def simulated(steps: Sequence[SampledGaussian], count: int, random: np.random.Generator) -> tuple[Scores, Scores]:
    """Scores of ``count`` canaries inside and as many outside, after steps that are honest."""
    inside, outside = np.zeros(count), np.zeros(count)
    for sigma, q, times in steps:
        for _ in range(times):
            there = (random.random(count) < q).astype(float)
            inside += log_likelihood_ratio(there + sigma * random.standard_normal(count), sigma, q)
            outside += log_likelihood_ratio(sigma * random.standard_normal(count), sigma, q)
    return inside, outside


@dataclass(frozen=True)
class Group:
    """Canaries that went through the same steps, and how many of them there are."""

    steps: tuple[SampledGaussian, ...]
    canaries: int


@dataclass(frozen=True)
class Separation:
    """A way to tell canaries inside from those outside: scores that are at least one of the cuts say "inside"."""

    inside: Scores
    outside: Scores
    cuts: tuple[float, ...]


def cuts_of(groups: Sequence[Group], noise: float, random: np.random.Generator) -> tuple[float, ...]:
    """Where a mechanism with ``noise`` times the σ of the groups calls some shares of those outside inside."""
    _, outside = _pooled(groups, noise, random)
    return tuple(float(cut) for cut in np.quantile(outside, [1 - share for share in ALARMS]))


def clopper_pearson(
    tests: Sequence[Separation], groups: Sequence[Group], delta: float, random: np.random.Generator, confidence: float = 0.95
) -> float:
    """ε of the noisiest mechanism of the claimed kind that the tests do not refute; near 0 if they refute none.

    The claim is a curve of Poisson-subsampled Gaussian steps: so many true positives at most for so many false ones, which the
    likelihood ratio attains (Neyman and Pearson), and no other test exceeds. A noise is refuted if at one of the cuts the
    lower limit of the true positives lies above what its curve allows at the upper limit of the false ones. The limits hold
    together at the ``confidence``.

    Args:
        tests: of independent canaries; nothing of them but the scores may depend on what the canaries did.
        groups: what the canaries went through.
        delta: at which ε is stated.
        random: of the curves.
    """
    low, high = math.log(1e-3), math.log(1e2)  # of the noise, in units of the claimed one
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (low, middle) if refuted(tests, groups, math.exp(middle), random, confidence) else (middle, high)
    return max(
        epsilon_spent([SampledGaussian(sigma * math.exp(high), q, times) for sigma, q, times in group.steps], delta)
        for group in groups
    )


def refuted(
    tests: Sequence[Separation], groups: Sequence[Group], noise: float, random: np.random.Generator, confidence: float = 0.95
) -> bool:
    """Whether the tests refute mechanisms with ``noise`` times the σ of the groups; of 1: whether the claim is false."""
    alpha = (1 - confidence) / (2 * sum(len(test.cuts) for test in tests))
    limits = [_limits(test.inside >= cut, test.outside >= cut, alpha) for test in tests for cut in test.cuts]
    there, outside = _pooled(groups, noise, random)
    return any(right > (there >= np.quantile(outside, 1 - wrong)).mean() for right, wrong in limits)


def _limits(inside: NDArray[np.bool_], outside: NDArray[np.bool_], alpha: float) -> tuple[float, float]:
    """True positives at least and false positives at most, each at confidence 1 - alpha."""
    hits, alarms = int(inside.sum()), int(outside.sum())
    right = float(beta.ppf(alpha, hits, len(inside) - hits + 1)) if hits else 0.0
    wrong = float(beta.ppf(1 - alpha, alarms + 1, len(outside) - alarms)) if alarms < len(outside) else 1.0
    return right, wrong


def _pooled(groups: Sequence[Group], noise: float, random: np.random.Generator) -> tuple[Scores, Scores]:
    """Simulated scores of canaries inside and outside, of mechanisms with ``noise`` times the σ of each group."""
    total = sum(group.canaries for group in groups)
    found = []
    for group in groups:
        steps = [event._replace(noise_multiplier=noise * event.noise_multiplier) for event in group.steps]
        found.append(simulated(steps, max(1, round(SIMULATED * group.canaries / total)), random))
    return np.concatenate([one for one, _ in found]), np.concatenate([other for _, other in found])


@dataclass(frozen=True)
class Pair:
    """Two Gaussians a distance apart: the estimate, and its lower limit."""

    estimate: float
    lower: float


def gaussian_pair(inside: Scores, outside: Scores, delta: float, confidence: float = 0.95) -> Pair:
    """ε of the two Gaussians that have the scores' means and their mean variance."""
    spread = math.sqrt((inside.var(ddof=1) + outside.var(ddof=1)) / 2)
    if not spread:
        return Pair(math.inf, math.inf) if inside.mean() > outside.mean() else Pair(0.0, 0.0)
    apart = max(0.0, float(inside.mean() - outside.mean())) / spread
    error = math.sqrt(1 / len(inside) + 1 / len(outside) + apart**2 / (2 * (len(inside) + len(outside))))
    lower = max(0.0, apart - float(norm.ppf(confidence)) * error)
    return Pair(epsilon_of_gaussians(apart, delta), epsilon_of_gaussians(lower, delta))


def epsilon_of_gaussians(mu: float, delta: float) -> float:
    """ε at δ of telling N(0, 1) from N(μ, 1) (arXiv 1805.06530, 1905.02383)."""

    def excess(epsilon: float) -> float:
        return float(ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon + _log_ndtr(-mu / 2 - epsilon / mu)) - delta)

    if mu <= 0 or excess(0.0) <= 0:
        return 0.0
    return float(brentq(excess, 0.0, MOST_EPSILON)) if excess(MOST_EPSILON) < 0 else MOST_EPSILON


def _log_ndtr(x: float) -> float:
    return float(norm.logcdf(x))


def one_run(inside: Scores, outside: Scores, delta: float, confidence: float = 0.95) -> float:
    """Steinke's bound: of the most certain guesses, how many are right; the best of a few numbers of guesses, together."""
    scores = np.concatenate([inside, outside])
    truth = np.concatenate([np.ones(len(inside), dtype=bool), np.zeros(len(outside), dtype=bool)])
    order, total = np.argsort(scores), len(scores)
    sizes = sorted({max(2, total // part) for part in (2, 4, 10, 20, 50)})
    found = 0.0
    for guesses in sizes:  # half of them "inside", the highest scores, half "outside", the lowest
        half = guesses // 2
        right = int(truth[order[-half:]].sum() + (~truth[order[:half]]).sum())
        found = max(found, _one_run(total, 2 * half, right, delta, (1 - confidence) / len(sizes)))
    return found


def _one_run(total: int, guesses: int, right: int, delta: float, alpha: float) -> float:
    """The largest ε that is refuted by so many right guesses."""

    def refuted(epsilon: float) -> bool:
        return p_value(total, guesses, right, epsilon, delta) < alpha

    low, high = 0.0, MOST_EPSILON
    if not refuted(low):
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def p_value(total: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """How likely so many right guesses are, at most, under (ε, δ): theorem 5.2 of arXiv 2305.08846."""
    share = 1 / (1 + math.exp(-epsilon))
    most = float(binom.sf(right - 1, guesses, share))
    largest = below = 0.0
    for i in range(1, right + 1):
        below += float(binom.pmf(right - i, guesses, share))
        largest = max(largest, below / i)
    return min(1.0, most + largest * delta * 2 * total)
