"""ε of many different steps for a site's ledger: composed once, and remembered between processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lalora_flwr.privacy.accounting import HEADLINE, epsilon_spent
from lalora_flwr.privacy.composition.memory import Compositions
from lalora_flwr.privacy.events import SampledGaussian


class Composer:
    """A `Compose` for a site's ledger: as `epsilon_spent`, and what was composed outlives the process.

    Guarantee: as `epsilon_spent`. A file of the folder that is missing, damaged or of other versions is composed anew.
    """

    def __init__(self, cache: Path | None = None) -> None:
        """``cache``: as in `Compositions`."""
        self._compositions = Compositions(cache)

    def __call__(self, history: Sequence[SampledGaussian], delta: float, accountant: str) -> float:
        if accountant == HEADLINE:
            return self._compositions.epsilon(history, delta)
        return epsilon_spent(history, delta, accountant)
