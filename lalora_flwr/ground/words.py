"""Words that tables, plots and the console share."""

from __future__ import annotations

import math


def epsilon_label(epsilon: float, *, said: bool = False) -> str:
    """``ε = 3``, or ``non-private``; with ``said`` the latter names its ε too, for a column or a panel among others."""
    return f"ε = {epsilon:g}" if math.isfinite(epsilon) else "non-private (ε = inf)" if said else "non-private"
