"""Average of the adapters that rounds released: less of their noise, at no cost in ε, since all of them are released already."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from lalora_flwr.methods.updates import Tensors

WINDOW = 0.25  # share of a run's rounds that the average reaches back


class RunningAverage:
    """Exponential average of adapters without the weight of those before the first: one adapter is its own average.

    Every tensor is averaged by itself: it is for adapters whose tensors mean the same from round to round. `forget` starts anew
    where a merge expresses the adapter in another way (SVD, rotation): the mean of two factors across that means nothing.

    Attributes:
        decay: weight of what was, each round; 1 - 1 / (`WINDOW` · rounds), and 0 in runs so short that only the last counts.
    """

    def __init__(self, rounds: int) -> None:
        self.decay = max(0.0, 1 - 1 / max(1.0, WINDOW * rounds))
        self._weight = 0.0
        self._sums: dict[str, NDArray[np.float64]] = {}

    def add(self, adapter: Tensors) -> None:
        """One more released adapter, all of its tensors."""
        self._weight = self.decay * self._weight + (1 - self.decay)
        for name, value in adapter.items():
            before = self._sums.get(name, 0.0)
            self._sums[name] = self.decay * before + (1 - self.decay) * np.asarray(value, dtype=np.float64)

    def forget(self) -> None:
        self._weight, self._sums = 0.0, {}

    def value(self) -> dict[str, NDArray[np.float32]]:
        """The average, float32; empty before the first `add`."""
        return {name: np.asarray(total / self._weight, dtype=np.float32) for name, total in self._sums.items()}

    def state(self) -> tuple[float, Mapping[str, NDArray[np.float64]]]:
        """What `restore` needs: the weight, as JSON has it, and tensors."""
        return self._weight, self._sums

    def restore(self, weight: float, sums: Mapping[str, NDArray[np.float64]]) -> None:
        self._weight, self._sums = weight, dict(sums)
