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

from lalora_flwr.privacy.composition.lattice import FEWEST_POINTS_EXPONENT, Lattice
from lalora_flwr.privacy.composition.step import ROUNDING, Array, Pair, moments, step_loss

_NEGLIGIBLE = -80.0  # log of a spectrum's magnitude


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
        """The distribution of both, the other taken ``times`` times."""
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


def step_spectrum(pair: Pair, direction: int, lattice: Lattice, steps: int, most: int) -> Spectrum:
    """The spectrum of one step, without the frequencies that vanish for ``steps`` of them.

    ``most``: how many of the lowest frequencies are of interest; about as many are given.
    """
    return _step_spectrum(pair, direction, lattice, steps.bit_length(), (most - 1).bit_length())


def _own_exponent(pair: Pair, lattice: Lattice) -> int:
    """A pair's own lattice is as coarse as its losses allow, which saves time: its spectrum repeats itself."""
    return min(max(moments(*pair).exponent, lattice.fine), lattice.coarse - FEWEST_POINTS_EXPONENT)


@lru_cache(maxsize=2048)
def _step_spectrum(pair: Pair, direction: int, lattice: Lattice, steps_bits: int, most_bits: int) -> Spectrum:
    exponent = _own_exponent(pair, lattice)
    loss = step_loss(*pair, exponent)[direction]
    points = lattice.factor << (lattice.coarse - exponent)
    held = np.flatnonzero(loss.probabilities)
    exponents = lattice.theta * loss.losses[held]
    log_weights = np.log(loss.probabilities[held]) + exponents
    top = float(log_weights.max())
    weights = np.exp(log_weights - top)
    total = float(weights.sum())
    values = np.fft.rfft(np.bincount((loss.first + held) % points, weights / total, minlength=points))
    wanted = np.arange(min(1 << most_bits, lattice.points // 2 + 1))
    if len(wanted) > len(values):
        wanted %= points
        folded = values[np.minimum(wanted, points - wanted)]
        values = np.where(2 * wanted > points, folded.conj(), folded)
    values = values[: len(wanted)]
    magnitude = np.maximum(np.abs(values), 1e-300)
    error = 4 * ROUNDING * math.log2(points)
    log_magnitude, doubt = np.minimum(np.log(magnitude), 0.0), np.log1p(error / magnitude)
    fewest = 2.0 ** (steps_bits - 1)
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
    for pair, times in sorted(steps, key=lambda step: _own_exponent(step[0], lattice)):  # those first that end soonest
        step = step_spectrum(pair, direction, lattice, times, lattice.points if whole is None else len(whole.turns))
        if whole is None:
            ones = np.zeros(len(step.turns))
            whole = Spectrum(ones, ones, ones, 0.0, 0.0, 0.0, 0.0, 0.0)
        whole = whole.plus(step, times)
    if whole is None:
        raise ValueError("no steps to compose")
    return whole
