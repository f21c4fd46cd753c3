"""Smoothing along the features whose width follows the noise: the future work that LA-LoRA's paper (arXiv 2602.19926) names.

    slot of R rows of n features, at its step t, for each width w of 1 3 5 9 17 33, S_w its smoothing matrix (`smoothing`):
        r_w = ‖S_w g - g‖² / ν² + 2 R tr S_w - R n
        ρ_w = 0.9 ρ_w + 0.1 r_w
    step along S_w g / ‖taps of w‖ of the w with the least ρ_w, the narrowest of equals

r_w is Stein's unbiased estimate (1981) of the squared error ‖S_w g - f‖² / ν² against the gradient f without noise, from the
noised gradient and ν alone, the standard deviation of its noise: post-processing, so nothing is spent on the choice. It is right
whatever the order of the features: where neighbours are not alike and noise is large, wide is chosen since it makes the error of
this one gradient smaller. Of the sum of many, in which noise averages out, it would only make the steps shorter; divided by the
norm of the taps they have the noise that they had before, for which the learning rate by rule is made. Safe under record-level
DP. Without privacy, and for what has no feature axis, the gradient stays as it is.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lalora_flwr.adapter.slots import Slot
from lalora_flwr.methods.filters import Around, Filter, State, remembered
from lalora_flwr.methods.smoothing import along_features, binomial, own_share, rows_of, smooth_rows

if TYPE_CHECKING:
    from torch import Tensor

WIDTHS = (1, 3, 5, 9, 17, 33)
NORMS = tuple(math.sqrt(sum(tap**2 for tap in binomial(width))) for width in WIDTHS)  # what white noise is multiplied with
REMEMBERED = 0.9
RISKS = "risks"  # what is remembered, by width


class Adaptive(Filter):
    """`lalora_flwr.methods.smoothing.Gauss` of the width with the least estimated error, for each slot, at equal noise."""

    name = "gauss-adaptive"
    remembers = True
    stretch = 1 / min(NORMS)

    def __call__(self, slot: Slot, gradient: Tensor, state: State, around: Around) -> Tensor:
        if slot.feature_axis is None or not around.noise:
            return gradient
        rows = rows_of(slot, gradient)
        smoothed = [rows if width == 1 else smooth_rows(rows, width) for width in WIDTHS]
        risks = rows.new_tensor(
            [risk(rows, one, own_share(rows.shape[1], width), around.noise) for one, width in zip(smoothed, WIDTHS, strict=True)]
        )
        state[RISKS] = REMEMBERED * remembered(state, RISKS, risks) + (1 - REMEMBERED) * risks
        best = int(state[RISKS].argmin())
        return along_features(slot, gradient, smoothed[best] / NORMS[best])


def risk(rows: Tensor, smoothed: Tensor, trace: float, noise: float) -> float:
    """Stein's estimate of the squared error of smoothed rows, over the variance of the noise.

    Args:
        rows, smoothed: (rows, features), before and after.
        trace: of the smoothing matrix of one row.
        noise: standard deviation on each entry of ``rows``.
    """
    return float((smoothed - rows).double().square().sum()) / noise**2 + len(rows) * (2 * trace - rows.shape[1])


ADAPTIVE = Adaptive()
