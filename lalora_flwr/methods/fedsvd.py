"""FedSVD (arXiv 2505.12805) and FedASK (arXiv 2507.09990): B trains, and the server turns the factors after each round.

    site i:   trains B, A frozen;  sends B_i
    server:   B = mean of B_i;  U Σ Vᵀ = B A;   FedSVD: A = Vᵀ, B = U Σ      FedASK: A = √Σ Vᵀ, B = U √Σ;   sends both

The product stays what it is. Under FedSVD the rows of A are orthonormal, so that a record's gradient of B is no longer than what
reaches the layer, and less of it is clipped. FedASK's two rounds of sketches give the same product when A is shared and frozen on
the sites, as under DP: only the split of Σ differs. Both are post-processing of released factors, and safe under record-level DP
as published. Left out: FedSVD's choice of how seldom to turn (the paper turns every round, as here).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lalora_flwr.adapter.slots import LORA_A, LORA_B, factors_of
from lalora_flwr.methods.merges import Mean, Memory, Merged, Now
from lalora_flwr.methods.method import Method
from lalora_flwr.methods.schedules import ONLY_B
from lalora_flwr.methods.travel import EVERYTHING_DOWN
from lalora_flwr.methods.updates import Tensors, Updates


class Turned(Mean):
    """The mean, expressed in other factors of the same product."""

    takes_gradients, rewrites = False, True
    needs_parts = frozenset({LORA_A, LORA_B})
    moves_frozen = True

    def __init__(self, name: str, *, split: bool) -> None:
        """
        Args:
            name: of the merge.
            split: whether both factors get a root of the singular values, or B all of them.
        """
        self.name, self._split = name, split
        self.stride = 0.5 if split else 1.0  # A grows and shrinks with B, as if both trained

    def __call__(self, current: Tensors, updates: Updates, memory: Memory, now: Now) -> Merged:
        tensors = dict(super().__call__(current, updates, memory, now).tensors)
        for name_A, name_B in factors_of(now.layout):
            if name_B in tensors:
                A, B = turned(current[name_A], tensors[name_B], split=self._split)
                tensors[name_A], tensors[name_B] = A.astype(np.float32), B.astype(np.float32)
        return Merged(tensors, rewritten=True)


def turned(A: NDArray[np.floating], B: NDArray[np.floating], *, split: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Factors of the product B A, from its singular value decomposition, without forming it.

    Args:
        A: of shape (r, n).
        B: of shape (m, r).
        split: as `Turned`.

    Returns:
        A and B of the same shapes; where r is above m or n, the rows and columns beyond are zero.
    """
    rank = len(A)
    Q, R = np.linalg.qr(A.astype(np.float64).T)  # (n, k), (k, r)
    U, S, W = np.linalg.svd(B.astype(np.float64) @ R.T, full_matrices=False)  # (m, j), (j,), (j, k)
    root = np.sqrt(S) if split else S
    new_A, new_B = (W if not split else root[:, None] * W) @ Q.T, U * root
    return _padded(new_A, (rank, A.shape[1])), _padded(new_B, (len(B), rank))


def _padded(value: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.float64]:
    whole = np.zeros(shape)
    whole[: value.shape[0], : value.shape[1]] = value
    return whole


METHOD = Method(schedule=ONLY_B, travel=EVERYTHING_DOWN, merge=Turned("svd", split=False))
FEDASK = Method(schedule=ONLY_B, travel=EVERYTHING_DOWN, merge=Turned("svd-split", split=True))
