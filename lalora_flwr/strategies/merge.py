"""How the server combines what the sites send. Everything here works on released tensors: free under DP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Tensors = Mapping[str, NDArray[np.float32]]


def mean(replies: Sequence[Tensors]) -> dict[str, NDArray[np.float32]]:
    """Uniform mean of each tensor over the replies (FedAvg with equal weights; weights by record count would leak counts).

    The sum runs in float64 in the order given: sort the replies by site for a result that does not depend on arrival.

    Args:
        replies: one mapping a site, all with the same names and shapes; at least one.

    Returns:
        The means, float32, under the same names.
    """
    return {
        name: np.asarray(np.mean([reply[name] for reply in replies], axis=0, dtype=np.float64), dtype=np.float32)
        for name in replies[0]
    }


MERGES = {"mean": mean}
