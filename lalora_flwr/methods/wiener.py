"""A Wiener gain from the released gradient and the noise that is known to be in it.

    rank component c of a slot, n features, at its step t:
        s_t = β s_{t-1} + (1 - β)(‖g_c‖² / n - ν²)  from 0;   w_t likewise of 1;   ŝ = max(s_t / w_t, 0)
    γ_c = max(ŝ / (ŝ + ν²), 1/64);   step along g_c · γ_c / max over the slot's components of γ

ν is the standard deviation of the noise on an entry, of the site's own gradient or, where the server steps, of the mean; β = 0.9.
ŝ estimates a component's mean square without noise, and γ is the best linear gain for a signal of that size. A whole
component is one number because an estimate over n entries is off by ν² √(2/n) alone, which over the steps falls further; an
entry by itself says nothing. The least gain keeps a slot that trains moving. Without privacy, and for what has no feature axis
and so one component only, nothing is changed.

γ is the best gain of one gradient by itself, about 1/50 where it is nearly all noise. Of a sum of many steps, in which noise
averages out, it would only make all steps shorter. How long they are is the learning rate's business; what is left to the
filter is how the components compare, so the largest gain is 1. None is above it: noise is never amplified.

Post-processing of released gradients: safe under record-level DP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lalora_flwr.adapter.slots import Slot
from lalora_flwr.methods.filters import Around, Filter, State, remembered
from lalora_flwr.methods.smoothing import along_features, rows_of

if TYPE_CHECKING:
    from torch import Tensor

REMEMBERED = 0.9  # β
LEAST = 1 / 64
SIGNAL, WEIGHT = "signal", "weight"  # what is remembered


class Wiener(Filter):
    """Shrinks each rank component by the estimated share of signal in it, against the slot's best."""

    name = "wiener"
    remembers = True
    stretch = 1.0

    def __call__(self, slot: Slot, gradient: Tensor, state: State, around: Around) -> Tensor:
        if slot.feature_axis is None or not around.noise:
            return gradient
        rows = rows_of(slot, gradient)
        floor = around.noise**2
        signal = rows.square().mean(1) - floor
        if SIGNAL not in state or state[SIGNAL].shape != signal.shape:
            state[WEIGHT] = signal.new_zeros(1)
        state[SIGNAL] = REMEMBERED * remembered(state, SIGNAL, signal) + (1 - REMEMBERED) * signal
        state[WEIGHT] = REMEMBERED * state[WEIGHT].to(signal) + (1 - REMEMBERED)
        found = (state[SIGNAL] / state[WEIGHT]).clamp(min=0)
        gains = (found / (found + floor)).clamp(min=LEAST)
        shrunk = rows * (gains / gains.max()).unsqueeze(1)
        return along_features(slot, gradient, shrunk)


WIENER = Wiener()
