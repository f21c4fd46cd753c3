"""Low-pass filters along the features: LA-LoRA's (arXiv 2602.19926) and those of other widths, and their control.

    row of A or column of B, g_1 … g_n:   ĝ_i = Σ_j w_j g_{i+j},  j = -h … h,  w the binomial of 2h + 1 taps;  beyond an edge
    the features repeat in reverse:  … g_2 g_1 | g_1 g_2 …

`gauss5`, which is ``gauss:5``, has the taps 1 4 6 4 1 over 16, the paper's approximation of a Gaussian; ``gauss:W`` has the W
taps of the binomial, whose standard deviation is √(W - 1) / 2 features. Safe under record-level DP as published: it follows the
noise.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import TYPE_CHECKING

from lalora_flwr.adapter.slots import Slot
from lalora_flwr.methods.filters import Around, Filter, State

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WIDEST = 255  # taps: a standard deviation of 8 features


@lru_cache(maxsize=64)
def binomial(width: int) -> tuple[float, ...]:
    """The taps of an odd width, which sum to 1."""
    return tuple(math.comb(width - 1, k) / 2 ** (width - 1) for k in range(width))


class Gauss(Filter):
    """Replaces the noised gradient by its smoothed copy.

    Along the feature axis: the input features for A (r, n), the output features for B (m, r); rank components never mix. What has
    no such axis, as a trained head, keeps its gradient, as in the paper. White noise keeps the sum of the squared taps of its
    variance, 27 % with five; so does a signal without correlation between neighbouring features. Rows shorter than the taps
    keep a little more or less.
    """

    stretch = 1.0  # rows and columns of its matrix are positive and sum to 1

    def __init__(self, name: str, width: int) -> None:
        """
        Args:
            name: with the width.
            width: taps; odd.
        """
        self.name, self.width = name, width
        self.keeps = sum(tap**2 for tap in binomial(width))

    def kept(self, slot: Slot) -> float:
        return self.keeps if slot.feature_axis is not None else 1.0

    def __call__(self, slot: Slot, gradient: Tensor, state: State, around: Around) -> Tensor:
        if slot.feature_axis is None:
            return gradient
        return self._along(gradient, slot.feature_axis)

    def _along(self, x: Tensor, axis: int) -> Tensor:
        return smoothed(x, axis, self.width)


class GaussPermuted(Gauss):
    """`Gauss` along the features in a fixed random order: the control that tells what their own order contributes.

    It treats white noise exactly as `Gauss` does. What `Gauss` gains over it, it gains from neighbouring features that
    are alike; what both gain over no filter is a smaller step.
    """

    def _along(self, x: Tensor, axis: int) -> Tensor:
        import torch

        order = torch.randperm(x.shape[axis], generator=torch.Generator().manual_seed(x.shape[axis])).to(x.device)
        return smoothed(x.index_select(axis, order), axis, self.width).index_select(axis, order.argsort())


class OfWidth(Filter):
    """``gauss`` or ``gauss-permuted`` before a width is named."""

    def __init__(self, name: str, kind: type[Gauss]) -> None:
        self.name, self._kind = name, kind

    def parse(self, argument: str) -> Gauss:
        if not re.fullmatch(r"[1-9]\d{0,2}", argument) or not (3 <= int(argument) <= WIDEST and int(argument) % 2):
            raise ValueError(f"{self.name}:<width> with an odd width from 3 to {WIDEST}, such as {self.name}:5")
        return self._kind(f"{self.name}:{argument}", int(argument))


def rows_of(slot: Slot, gradient: Tensor) -> Tensor:
    """The gradient as (rows, features)."""
    rows = gradient.movedim(slot.feature_axis or 0, -1)
    return rows.reshape(-1, rows.shape[-1])


def along_features(slot: Slot, gradient: Tensor, rows: Tensor) -> Tensor:
    """Rows of `rows_of` in the shape of the gradient."""
    axis = slot.feature_axis or 0
    return rows.reshape(gradient.movedim(axis, -1).shape).movedim(-1, axis).contiguous()


def smooth_rows(x: Tensor, width: int) -> Tensor:
    """Each row of x (rows, features) as `smoothed`."""
    return smoothed(x, 1, width)


def smoothed(x: Tensor, axis: int, width: int) -> Tensor:
    """Convolve x along an axis with the binomial; symmetric padding repeats the edge: … b a | a b c …"""
    features = x.shape[axis]
    padded, first, *others = x.index_select(axis, _places(features, width, x.device)), *binomial(width)
    total = padded.narrow(axis, 0, features) * first
    for start, tap in enumerate(others, 1):  # for a few taps faster than torch's convolutions, and no less exact
        total.add_(padded.narrow(axis, start, features), alpha=tap)
    return total


@lru_cache(maxsize=256)
def _places(features: int, width: int, device: torch.device) -> Tensor:
    """The feature at each place of a row that is padded for the taps."""
    import torch  # here and elsewhere inside only: the names of filters are checked before torch is needed

    return _mirrored(torch.arange(-(width // 2), features + width // 2, device=device), features)


def _mirrored(indices: Tensor, features: int) -> Tensor:
    """Where the value of each index beyond the edges stands; also right for fewer features than taps."""
    period = 2 * features
    within = indices % period
    return within.where(within < features, period - 1 - within)


@lru_cache(maxsize=1024)
def own_share(features: int, width: int) -> float:
    """The trace of the matrix of `smooth_rows`: how much of each feature stays where it is, summed over a row."""
    import torch

    here, half = torch.arange(features), width // 2
    stays = [int((_mirrored(here + j, features) == here).sum()) for j in range(-half, half + 1)]
    return math.fsum(tap * count for tap, count in zip(binomial(width), stays, strict=True))


GAUSS5 = Gauss("gauss5", 5)
GAUSS5_PERMUTED = GaussPermuted("gauss5-permuted", 5)
GAUSS = OfWidth("gauss", Gauss)
GAUSS_PERMUTED = OfWidth("gauss-permuted", GaussPermuted)
