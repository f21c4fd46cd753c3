"""Where a history is composed: the tilt and the circle of `spectrum`, and the spacing of the lattice on it.

All of it is chosen by moments of the loss and changes how tight and how quick the result is, never that it is a bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lalora_flwr.privacy.composition.step import ORDERS, Array, Pair, moments

FEWEST_POINTS_EXPONENT = 4  # 64 points or more for every pair

_SLACK = 17.0  # log of how much rounding may grow, for one step, by a tilt that is not the best
_UNNOTICED = 16.0  # log of a share of δ that is not noticed
_WIDTH = 16.0  # of the circle, in standard deviations of the tilted whole
_COARSENING = 0.004  # spacing over the mean deviation of a step, below which a few fine steps are put on a coarser lattice
_MOST_POINTS = 2**20


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


def choose_lattice(totals: Totals, direction: int, delta: float) -> Lattice:
    """By the moments of the whole, and never part of a bound: the tilt that is served by the narrowest circle."""
    _, _, variance, deviation = totals.of_loss[direction]
    order, width = _tilt_and_width(totals, direction, math.log(min(delta, 0.01)))
    coarse = math.floor(math.log2(width)) - 2
    factor = 4
    while factor * 2.0**coarse < width:
        factor += 2
    fine = totals.finest
    if totals.pairs > 1 and deviation[order] > 0:
        fine = max(fine, math.floor(math.log2(_COARSENING * variance[order] / deviation[order])))
    while factor << (coarse - fine) > _MOST_POINTS:
        fine += 1
    return Lattice(order, min(fine, coarse - FEWEST_POINTS_EXPONENT), coarse, factor)


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
        above = (cumulant - ORDERS * epsilon - log_delta + _UNNOTICED) / np.where(
            ORDERS[:, None] < ORDERS, ORDERS - ORDERS[:, None], np.nan
        )
        width = np.maximum(below, np.nanmin(np.where(np.isfinite(above), above, np.inf), axis=1))
        width = np.maximum(width, 2.0 ** (totals.finest + 2 + FEWEST_POINTS_EXPONENT))
        if totals.pairs > 1:  # coarser choices: another lattice means composing everything anew
            width = 2.0 ** np.ceil(np.log2(width))
            width[1::2] = np.inf
        cost = np.log(width) + 0.5 * np.maximum(slack - most, 0.0)
    order = int(np.nanargmin(cost[: best + 1]))
    return order, float(width[order])
