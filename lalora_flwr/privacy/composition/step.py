"""The privacy loss of one Poisson-subsampled Gaussian step, on a lattice, and never too small.

With one record of difference, a step's release is drawn from N(0, σ²) or from (1 - q) N(0, σ²) + q N(1, σ²), in units of
C. The privacy loss is the log of the ratio of their densities: under the mixture if the record is removed, under the plain
Gaussian and with the other sign if it is added. Both directions are kept; ε is the larger one's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

Array = npt.NDArray[np.floating]
Pair = tuple[float, float]  # σ, q

REMOVE, ADD = 0, 1
ORDERS: Array = 2.0 ** (np.arange(-40, 65) / 2)  # of the exponential tilt, see `spectrum`
ROUNDING = float(np.finfo(np.float64).eps)  # twice the largest relative error of one operation

_REACH = 12.0  # standard deviations of the noise kept on each side; a share of 1e-33 is beyond
_CELLS = 16  # lattice points in one standard deviation of the loss: ε is at most 0.04 % too large for it
_LONGEST = 2**17  # lattice points of one step
_FINEST = 2.0**-30


@dataclass(frozen=True)
class Moments:
    """What the choice of a lattice and of a tilt goes by; not part of any bound.

    Attributes:
        of_loss: shape (2, 4, orders): for each direction and order θ the cumulant log E[exp(θ · loss)], and the mean,
            variance and standard deviation of the loss with its probabilities weighted by exp(θ · loss).
        exponent: the step's own lattice has spacing 2^exponent.
    """

    of_loss: Array
    exponent: int


@dataclass(frozen=True)
class StepLoss:
    """Probabilities of the losses (first + i) · spacing, and of an infinite loss.

    Guarantee: at every ε the δ of these probabilities is at least that of the step.
    """

    spacing: float
    first: int
    probabilities: Array
    infinite: float

    @property
    def losses(self) -> Array:
        return self.spacing * np.arange(self.first, self.first + len(self.probabilities))


def _loss_at(x: Array, sigma: float, q: float) -> Array:
    """log of mixture over plain density at x."""
    z = (x - 0.5) / sigma**2
    if q == 1:
        return z
    with np.errstate(over="ignore", divide="ignore"):
        near, far = np.log1p(q * np.expm1(np.minimum(z, 30.0))), z + np.log(q)
        return np.asarray(np.where(z < 30, near, far))


def _point_of(loss: Array, sigma: float, q: float) -> Array:
    """The x whose loss it is; -inf below the smallest loss, log(1 - q)."""
    if q == 1:
        return sigma**2 * loss + 0.5
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        z = np.where(loss < 30, np.log1p(np.maximum(np.expm1(np.minimum(loss, 30.0)) / q, -1.0)), loss - np.log(q))
    return sigma**2 * z + 0.5


@lru_cache(maxsize=4096)
def moments(sigma: float, q: float) -> Moments:
    """By quadrature over x, for one (σ, q)."""
    x = np.linspace(-_REACH * sigma, 1 + _REACH * sigma, 256)
    loss = _loss_at(x, sigma, q)
    log_weight = -0.5 * (x / sigma) ** 2
    log_weight -= np.logaddexp.reduce(log_weight)
    found = np.empty((2, 4, len(ORDERS)))
    for direction, signed, exponents in ((REMOVE, loss, ORDERS + 1), (ADD, -loss, ORDERS)):  # the mixture is e^loss denser
        tilted = log_weight + exponents[:, None] * signed
        top = tilted.max(axis=1, keepdims=True)
        weight = np.exp(tilted - top)
        total = weight.sum(axis=1)
        mean = weight @ signed / total
        variance = np.einsum("ox,ox->o", weight, (signed - mean[:, None]) ** 2) / total
        found[direction] = np.log(total) + top[:, 0], mean, variance, np.sqrt(variance)
    deviation = float(found[REMOVE, 3, 0])
    spacing = max(deviation / _CELLS, float(loss[-1] - loss[0]) / _LONGEST, _FINEST)
    return Moments(found, math.floor(math.log2(spacing)))


@lru_cache(maxsize=256)
def step_loss(sigma: float, q: float, exponent: int) -> tuple[StepLoss, StepLoss]:
    """A step's loss on the lattice of spacing 2^exponent: (removed, added).

    The probability of each cell is moved to its two ends so that its share under the other distribution stays what it is,
    which keeps δ at every lattice point and raises it in between ("connect the dots", arXiv 2207.04380). What lies beyond
    `_REACH` counts as an infinite loss above and as the smallest kept loss below. Rounding is upwards.
    """
    spacing = 2.0**exponent
    ends = _loss_at(np.array([-_REACH * sigma, 1 + _REACH * sigma]), sigma, q)
    first, last = math.floor(ends[0] / spacing), math.ceil(ends[1] / spacing) + 1
    edges = spacing * np.arange(first, last + 1)
    x = _point_of(edges, sigma, q)
    plain, plain_error = _masses(x / sigma)
    shifted, shifted_error = _masses((x - 1) / sigma)
    mixed, mixed_error = (1 - q) * plain + q * shifted, (1 - q) * plain_error + q * shifted_error
    removed = _to_the_ends(mixed, plain, mixed_error, plain_error, edges)
    reverse = slice(None, None, -1)
    added = _to_the_ends(plain[reverse], mixed[reverse], plain_error[reverse], mixed_error[reverse], -edges[reverse])
    return StepLoss(spacing, first, *removed), StepLoss(spacing, -last, *added)


def _masses(t: Array) -> tuple[Array, Array]:
    """Probability of a standard normal variable below t[0], in each cell, and above t[-1]; and bounds on their errors."""
    below, above = ndtr(t), ndtr(-t)
    inner = np.where(t[:-1] > 0, above[:-1] - above[1:], below[1:] - below[:-1])
    edge = np.minimum(below, above)
    with np.errstate(invalid="ignore"):
        error = 8 * ROUNDING * np.where(edge > 0, (1 + t**2) * edge, 0.0)
    return (
        np.concatenate([below[:1], np.maximum(inner, 0.0), above[-1:]]),
        np.concatenate([error[:1], np.maximum(error[:-1], error[1:]), error[-1:]]),
    )


def _to_the_ends(mass: Array, other: Array, mass_error: Array, other_error: Array, edges: Array) -> tuple[Array, float]:
    """Probabilities at the edges, and of an infinite loss. Masses: below the first edge, in each cell, above the last."""
    inner, low = mass[1:-1], edges[:-1]
    with np.errstate(over="ignore", invalid="ignore"):
        scale = np.exp(low)
        upper = (inner - other[1:-1] * scale) + (mass_error[1:-1] + other_error[1:-1] * scale)
        upper = upper / -math.expm1(low[0] - low[1])
    upper = np.clip(np.where(np.isfinite(upper), upper, inner), 0.0, inner)
    at_edges = np.zeros(len(edges))
    at_edges[:-1] += inner - upper
    at_edges[1:] += upper
    at_edges[0] += mass[0]
    return at_edges, float(mass[-1] + mass_error[-1])
