"""Composition of steps by Fourier transform, and ε of the whole at a δ.

The losses of independent steps add up, so their distributions are convolved: the Fourier transform of the whole is the
product of those of the steps, each to the power of its count. Two devices make that exact enough for the smallest δ:

- *Tilt.* Probabilities are weighted by exp(θ · loss), divided by its mean, with θ chosen so that the whole's weight sits
  near ε. A rounding error of 1e-16 is then relative to what is looked for, not to a δ of 1e-12.
- *Circle.* A discrete transform adds losses modulo a width W. δ(ε) is a sum over losses above ε, each with the weight
  (1 - e^(ε - loss)) e^(-θ (loss - ε)); on the circle every loss gets that weight for all its images, which is never less.

The spectrum of many steps vanishes but for its lowest frequencies. They are all that is kept, and δ at a lattice point is
a sum over them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lalora_flwr.privacy.composition_step import ORDERS, ROUNDING, Array, moments, step_loss

Pair = tuple[float, float]  # σ, q

_NEGLIGIBLE = -80.0  # log of a spectrum's magnitude
_SLACK = 17.0  # log of how much rounding may grow, for one step, by a tilt that is not the best
_UNNOTICED = 12.0  # log of a share of δ that is not noticed
_WIDTH = 16.0  # of the circle, in standard deviations of the tilted whole
_COARSENING = 0.004  # spacing over the mean deviation of a step, below which a few fine steps are put on a coarser lattice
_MOST_POINTS = 2**20
_FEWEST_POINTS_EXPONENT = 4  # 64 points or more for every pair


@dataclass(frozen=True)
class Lattice:
    """Where one direction of a history is composed: the tilt, the spacing 2^fine, the width ``factor`` · 2^coarse."""

    order: int  # index into ORDERS
    fine: int
    coarse: int
    factor: int

    @property
    def theta(self) -> float:
        return float(ORDERS[self.order])

    @property
    def spacing(self) -> float:
        return 2.0**self.fine

    @property
    def points(self) -> int:
        return self.factor << (self.coarse - self.fine)


@dataclass(frozen=True)
class Totals:
    """Sums over all steps, from which a lattice is chosen: ``of_loss`` as `Moments`; ``finest``: the smallest exponent."""

    of_loss: Array
    finest: int
    pairs: int
    steps: int

    def plus(self, pair: Pair, steps: int, is_new: bool) -> Totals:
        of_pair = moments(*pair)
        finest = min(self.finest, of_pair.exponent)
        return Totals(self.of_loss + steps * of_pair.of_loss, finest, self.pairs + is_new, self.steps + steps)


NOTHING = Totals(np.zeros((2, 4, len(ORDERS))), 1 << 30, 0, 0)


@dataclass(frozen=True)
class Spectrum:
    """Fourier transform of a tilted, normalised distribution of losses, at the lowest frequencies; the others vanish.

    Attributes:
        log_magnitude, turns: of each value; the argument is counted in turns.
        doubt: bound on the log of the ratio between each value's magnitude as computed and as it is, from rounding.
        cumulant: log of the mean by which the weights were divided.
        infinite: bound on the probability of an infinite loss.
        relative: bound on the relative error of each probability.
        absolute: another bound on the error of each value, those left out included.
        left_out: bound on the magnitude of each value left out.
    """

    log_magnitude: Array
    turns: Array
    doubt: Array
    cumulant: float
    infinite: float
    relative: float
    absolute: float
    left_out: float

    def plus(self, other: Spectrum, times: int) -> Spectrum:
        """The distribution of both, the other taken so many times."""
        common = min(len(self.turns), len(other.turns))
        log_magnitude = self.log_magnitude[:common] + times * other.log_magnitude[:common]
        doubt = self.doubt[:common] + times * (other.doubt[:common] + 8 * ROUNDING) + 8 * ROUNDING
        length = _significant(log_magnitude)
        turns = self.turns[:length] + times * other.turns[:length]
        return Spectrum(
            log_magnitude[:length],
            turns - np.rint(turns),
            doubt[:length],
            self.cumulant + times * other.cumulant,
            self.infinite + times * other.infinite,
            self.relative + times * other.relative,
            self.absolute + times * (other.absolute + 8 * ROUNDING) + 8 * ROUNDING,  # no value is above 1
            max(self.left_out, other.left_out, _largest(log_magnitude[length:] + doubt[length:])),
        )

    def error(self) -> Array:
        """Bound on the error of each value."""
        sure = np.exp(self.log_magnitude) * np.expm1(np.minimum(self.doubt, 50.0))
        return np.where(self.doubt < 50, np.minimum(sure, self.absolute), self.absolute)


def _largest(logs: Array) -> float:
    return math.exp(min(float(logs.max()), 0.0)) if len(logs) else 0.0


def _significant(log_magnitude: Array) -> int:
    """Length of the array without its vanishing end."""
    above = np.flatnonzero(log_magnitude > _NEGLIGIBLE)
    return int(above[-1]) + 1 if len(above) else 1


def choose_lattice(totals: Totals, direction: int, delta: float) -> Lattice:
    """By the moments of the whole, and never part of a bound: the tilt that is served by the narrowest circle."""
    _, _, variance, deviation = totals.of_loss[direction]
    order, width = _tilt_and_width(totals, direction, math.log(min(delta, 0.01)))
    width = max(width, 2.0 ** (totals.finest + 6))
    coarse = math.floor(math.log2(width)) - 2
    factor = 4
    while factor * 2.0**coarse < width:
        factor += 2
    fine = totals.finest
    if totals.pairs > 1 and deviation[order] > 0:
        fine = max(fine, math.floor(math.log2(_COARSENING * variance[order] / deviation[order])))
    while factor << (coarse - fine) > _MOST_POINTS:
        fine += 1
    return Lattice(order, min(fine, coarse - _FEWEST_POINTS_EXPONENT), coarse, factor)


def _tilt_and_width(totals: Totals, direction: int, log_delta: float) -> tuple[int, float]:
    """An index into `ORDERS` and a width, in units of loss, with which neither rounding nor the circle are noticed in ε."""
    cumulant, mean, variance, _ = totals.of_loss[direction]
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        chernoff = (cumulant - log_delta) / ORDERS
        best = int(np.nanargmin(chernoff))
        slack = ORDERS * (chernoff - chernoff[best])  # log of how much smaller than δ rounding errors must be
        most = min(max(_SLACK - math.log(totals.steps), 4.0), 14.0)
        spread = np.sqrt(variance)
        # Below ε weights fall by exp(-θ · width): what lies there must not come round as if it were above.
        below = _WIDTH * spread + (_UNNOTICED + slack) / ORDERS
        # Above ε + width they must not rise again: the Chernoff bound of what lies there, by each larger order.
        epsilon = np.maximum(mean - 3 * spread, 0.0)[:, None]
        above = (cumulant - ORDERS * epsilon - log_delta + _UNNOTICED) / np.where(ORDERS > ORDERS[:, None], ORDERS - ORDERS[:, None], np.nan)
        width = np.maximum(below, np.nanmin(np.where(np.isfinite(above), above, np.inf), axis=1))
        cost = np.log(width) + 0.5 * np.maximum(slack - most, 0.0)
    order = int(np.nanargmin(cost[: best + 1]))
    return order, float(width[order])


def step_spectrum(pair: Pair, direction: int, lattice: Lattice, steps: int) -> Spectrum:
    """The spectrum of one step, without the frequencies that vanish for ``steps`` of them."""
    return _step_spectrum(pair, direction, lattice, steps.bit_length())


@lru_cache(maxsize=2048)
def _step_spectrum(pair: Pair, direction: int, lattice: Lattice, bits: int) -> Spectrum:
    exponent = min(max(moments(*pair).exponent, lattice.fine), lattice.coarse - _FEWEST_POINTS_EXPONENT)
    loss = step_loss(*pair, exponent)[direction]
    points = lattice.factor << (lattice.coarse - exponent)
    held = np.flatnonzero(loss.probabilities)
    exponents = lattice.theta * loss.losses[held]
    log_weights = np.log(loss.probabilities[held]) + exponents
    top = float(log_weights.max())
    weights = np.exp(log_weights - top)
    total = float(weights.sum())
    values = np.fft.rfft(np.bincount((loss.first + held) % points, weights / total, minlength=points))
    if lattice.points > points:  # on a coarser lattice, whose spectrum repeats itself
        wanted = np.arange(lattice.points // 2 + 1) % points
        folded = values[np.minimum(wanted, points - wanted)]
        values = np.where(2 * wanted > points, folded.conj(), folded)
    magnitude = np.maximum(np.abs(values), 1e-300)
    error = 4 * ROUNDING * math.log2(points)
    log_magnitude, doubt = np.minimum(np.log(magnitude), 0.0), np.log1p(error / magnitude)
    fewest = 2.0 ** (bits - 1)
    length = _significant(fewest * log_magnitude)
    return Spectrum(
        log_magnitude[:length],
        np.angle(values[:length]) / (2 * math.pi),
        doubt[:length],
        top + math.log(total),
        loss.infinite,
        ROUNDING * (8 + 2 * float(np.abs(exponents).max())),
        error,
        _largest(fewest * (log_magnitude + doubt)[length:]),
    )


def compose(steps: Iterable[tuple[Pair, int]], direction: int, lattice: Lattice, start: Spectrum | None = None) -> Spectrum:
    """The spectrum of all steps, of which there is at least one, on top of ``start``."""
    whole = start
    for pair, times in steps:
        step = step_spectrum(pair, direction, lattice, times)
        if whole is None:
            ones = np.zeros(len(step.turns))
            whole = Spectrum(ones, ones, ones, 0.0, 0.0, 0.0, 0.0, 0.0)
        whole = whole.plus(step, times)
    if whole is None:
        raise ValueError("no steps to compose")
    return whole


def epsilon_at(delta: float, whole: Spectrum, lattice: Lattice) -> float:
    """The smallest ε >= 0 for which δ of the composed losses is certainly at most ``delta``; inf if there is none.

    Guarantee: an upper bound, with all errors of rounding, of the circle and of what was neglected on its side.
    """
    return _Tail(whole, lattice).epsilon_at(delta - whole.infinite)


class _Tail:
    """Sums over the losses from a lattice point upwards, on the circle, of the tilted probabilities.

    With S(j, a) = sum over i >= 0 of p(j + i) exp(-a · i · spacing), δ at ε = j · spacing is
    exp(cumulant - θ ε) · (S(j, θ) - S(j, θ + 1)), and S is again a Fourier series: p's, divided by 1 - exp(-a · spacing + iω).
    """

    def __init__(self, whole: Spectrum, lattice: Lattice) -> None:
        self._lattice, self._cumulant = lattice, whole.cumulant
        self._theta, self._spacing = lattice.theta, lattice.spacing
        values = np.exp(whole.log_magnitude + 2j * math.pi * whole.turns)
        frequencies = np.arange(len(values))
        self._turns = frequencies / lattice.points
        both = np.where((frequencies == 0) | (2 * frequencies == lattice.points), 1, 2)  # with the conjugate frequency
        weights = both / lattice.points
        rates = np.array([self._theta, self._theta + 1])
        transforms = 1 / -np.expm1(-rates[:, None] * self._spacing + 2j * math.pi * self._turns)
        self._series = values * weights * transforms
        self._factor = math.exp(whole.relative) if whole.relative < 1 else math.inf
        # The kernel (1 - e^-y) e^(-θ y) is at most 1 / (1 + θ), its sum over lattice points at most 1 / (θ (1 + θ) spacing);
        # the mean magnitude of its transform is at most the root of the sum of its squares.
        # Within a cell the second sum counts up to 1 - exp(-spacing) less.
        kernel = np.abs(transforms[0] - transforms[1]) - math.expm1(-self._spacing) * np.abs(transforms[1])
        self._error = (
            float(kernel * weights @ whole.error())
            + 2 * whole.left_out / ((1 + self._theta) * math.sqrt(self._theta * self._spacing))
            + 64 * ROUNDING * float(np.abs(self._series).sum(axis=1).max())
        )

    def _sums_every(self, stride: int) -> Array:
        """S at the lattice points 0, stride, ...: shape (2, points / stride). Frequencies must fit."""
        size = self._lattice.points // stride
        halved = self._series / 2  # a real inverse transform counts each frequency but the first and the last twice
        halved[:, 0] *= 2
        padded = np.zeros((2, size // 2 + 1), dtype=np.complex128)
        padded[:, : halved.shape[1]] = halved
        if 2 * (halved.shape[1] - 1) == size:
            padded[:, -1] *= 2
        return np.fft.irfft(padded, size) * size

    def _sums_at(self, point: int) -> Array:
        whole_turns = self._turns * (point % self._lattice.points)
        return (self._series * np.exp(2j * math.pi * (whole_turns - np.rint(whole_turns)))).real.sum(axis=1)

    def _log_delta(self, sums: Array, losses: Array | float) -> Array:
        """log of the bound on δ, without infinite losses."""
        raised = np.maximum(sums[0] - sums[1], 0.0) * self._factor + self._error
        return self._cumulant - self._theta * losses + np.log(raised)

    def epsilon_at(self, delta: float) -> float:
        if delta <= 0 or not math.isfinite(self._factor):
            return math.inf
        log_delta = math.log(delta)
        if self._log_delta(self._sums_at(0), 0.0) <= log_delta:
            return 0.0
        lattice = self._lattice
        stride = 1
        while lattice.points % (2 * stride) == 0 and lattice.points // (2 * stride) >= 2 * self._series.shape[1]:
            stride *= 2
        # Chernoff's bound is an ε that suffices. Look downwards from there, one turn of the circle at most.
        top = math.ceil((self._cumulant - log_delta) / self._theta / (self._spacing * stride)) + 1
        points = stride * np.arange(max(top - lattice.points // stride + 1, 0), top + 1)
        enough = self._log_delta(
            self._sums_every(stride)[:, points // stride % (lattice.points // stride)], points * self._spacing
        ) <= log_delta
        if not enough[-1]:
            return math.inf
        lacking = np.flatnonzero(~enough)
        if not len(lacking):
            return float(points[0] * self._spacing)
        low, high = int(points[lacking[-1]]), int(points[lacking[-1] + 1])
        while high - low > 1:
            middle = (low + high) // 2
            if self._log_delta(self._sums_at(middle), middle * self._spacing) <= log_delta:
                high = middle
            else:
                low = middle
        return self._within_cell(high, log_delta)

    def _within_cell(self, point: int, log_delta: float) -> float:
        """ε between the lattice point before and this one, where δ is linear in exp(ε)."""
        sums, loss = self._sums_at(point), point * self._spacing
        allowed = (math.exp(log_delta - self._cumulant + self._theta * loss) - self._error) / self._factor
        ratio = (sums[0] - allowed) / sums[1]
        if not 0 < ratio < 1:
            return loss
        return max(loss + math.log(ratio), loss - self._spacing, 0.0)
