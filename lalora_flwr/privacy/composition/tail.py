"""ε at a δ of steps that were composed, from the lowest frequencies alone."""

from __future__ import annotations

import math

import numpy as np

from lalora_flwr.privacy.composition.lattice import Lattice
from lalora_flwr.privacy.composition.spectrum import Spectrum
from lalora_flwr.privacy.composition.step import ROUNDING, Array


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
        self._relative = whole.relative + 16 * ROUNDING * (1 + abs(whole.cumulant))
        self._factor = math.exp(min(self._relative, 1.0))
        # Within a cell the second sum counts up to 1 - exp(-spacing) less. The kernel (1 - e^-y) e^(-θ y) is at most
        # 1 / (1 + θ), and its sum over lattice points at most that times 1 + 1 / (θ · spacing); the mean magnitude of a
        # transform is at most the root of the sum of squares.
        kernel = np.abs(transforms[0] - transforms[1]) - math.expm1(-self._spacing) * np.abs(transforms[1])
        self._error = (
            float(kernel * weights @ whole.error())
            + 2 * whole.left_out * (1 / (1 + self._theta) + self._spacing) * math.sqrt(1 + 1 / (self._theta * self._spacing))
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
        turned = self._series * np.exp(2j * math.pi * (whole_turns - np.rint(whole_turns)))
        return np.asarray(turned.real.sum(axis=1))

    def _log_delta(self, sums: Array, losses: Array | float) -> Array | float:
        """log of the bound on δ, without infinite losses."""
        raised = np.maximum(sums[0] - sums[1], 0.0) * self._factor + self._error
        log_delta: Array | float = self._cumulant - self._theta * losses + np.log(raised)
        return log_delta

    def epsilon_at(self, delta: float) -> float:
        if delta <= 0:
            return math.inf
        log_delta = math.log(delta)
        chernoff = max((self._cumulant + self._relative - log_delta) / self._theta, 0.0)  # suffices: δ <= E e^(θ (loss - ε))
        if self._relative >= 1:
            return chernoff
        if self._log_delta(self._sums_at(0), 0.0) <= log_delta:
            return 0.0
        stride = self._stride()
        top, turn = math.ceil(chernoff / (self._spacing * stride)) + 1, self._lattice.points // stride
        coarse = np.arange(max(top - turn + 1, 0), top + 1)  # downwards from there, one turn of the circle at most
        enough = self._log_delta(self._sums_every(stride)[:, coarse % turn], coarse * stride * self._spacing) <= log_delta
        lacking = np.flatnonzero(~enough)
        if not len(lacking):
            return min(float(coarse[0] * stride * self._spacing), chernoff)
        if lacking[-1] == len(coarse) - 1:
            return chernoff
        low = int(coarse[lacking[-1]]) * stride
        high = low + stride
        while high - low > 1:
            middle = (low + high) // 2
            if self._log_delta(self._sums_at(middle), middle * self._spacing) <= log_delta:
                high = middle
            else:
                low = middle
        return min(self._within_cell(high, log_delta), chernoff)

    def _stride(self) -> int:
        """The largest power of two at which points still show all frequencies."""
        points, stride = self._lattice.points, 1
        while points % (2 * stride) == 0 and points // (2 * stride) >= 2 * self._series.shape[1]:
            stride *= 2
        return stride

    def _within_cell(self, point: int, log_delta: float) -> float:
        """ε between the lattice point before and this one, where δ is linear in exp(ε)."""
        sums, loss = self._sums_at(point), point * self._spacing
        allowed = (math.exp(log_delta - self._cumulant + self._theta * loss) - self._error) / self._factor
        ratio = (sums[0] - allowed) / sums[1]
        if not 0 < ratio < 1:
            return loss
        return max(loss + math.log(ratio), loss - self._spacing, 0.0)
