"""Filters over the steps of a slot: DOPPLER's low-pass filter and DiSK's average.

DOPPLER (arXiv 2408.13460), first order, β = 0.9 unless named (``doppler:β``), for each slot at its own step t:

    m_t = β m_{t-1} + (1 - β)/2 (g_t + g_{t-1}),   c_t likewise of a gradient of 1,   step along m_t / c_t

DiSK (arXiv 2410.03883), κ = 0.7 unless named (``disk:κ``):

    m_t = (1 - κ) m_{t-1} + κ g_t,   m_0 = g_0,   step along m_t

Both are safe under record-level DP as published and follow the noise. A slot that is frozen at a step has no step t. Left out of
DiSK: where the gradient is taken. The paper takes it at the adapter and a little ahead of it, x_t + γ (x_t - x_{t-1}), and
clips a record's two gradients as one, as ``kalman`` does; ahead alone suffices for γ = (1 - κ)/κ. That form under plain SGD, from
m = 0, is DP-SGD without a filter whose running average x̄_t = (1 - κ) x̄_{t-1} + κ x_t is the result (a test says so), as with
``merge.average = "ema"`` over more rounds. Here is what else there is: the average of gradients taken at the adapter itself. Left
out of DOPPLER: filters of higher order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lalora_flwr.adapter.slots import Slot
from lalora_flwr.methods.filters import Around, Share, State, remembered

if TYPE_CHECKING:
    from torch import Tensor

PAST, WEIGHT, MEAN = "past", "weight", "mean"  # what is remembered


class Doppler(Share):
    """DOPPLER's low-pass filter of first order, whose zero is at the highest frequency.

    Noise of a step comes out over several steps: a single filtered gradient has (1 - β)/2 of its variance, a walk over many
    steps all of it. So the rate by rule is that of no filter.
    """

    remembers = True
    stretch = 1.0  # a weighted mean

    def __call__(self, slot: Slot, gradient: Tensor, state: State, around: Around) -> Tensor:
        new = (1 - self.share) / 2
        fresh = PAST not in state or state[PAST].shape != gradient.shape
        weight = gradient.new_zeros(1) if fresh else state[WEIGHT].to(gradient)
        value, share = remembered(state, PAST, gradient) + new * gradient, weight + new
        state[PAST], state[WEIGHT] = self.share * value + new * gradient, self.share * share + new
        return value / share


class Disk(Share):
    """DiSK's exponential average of gradients: noise comes out over several steps, as with `Doppler`."""

    remembers = True
    stretch = 1.0  # a weighted mean

    def __call__(self, slot: Slot, gradient: Tensor, state: State, around: Around) -> Tensor:
        if MEAN not in state or state[MEAN].shape != gradient.shape:
            state[MEAN] = gradient.clone()
        else:
            state[MEAN] = (1 - self.share) * state[MEAN].to(gradient) + self.share * gradient
        return state[MEAN].clone()


DOPPLER = Doppler("doppler", 0.9)
DISK = Disk("disk", 0.7)
