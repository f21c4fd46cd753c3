"""FlexLoRA (arXiv 2402.11505), in the form without the dense matrix that is known as HLoRA: a rank for each site.

    server:   sends the first r_k rows of A and columns of B
    site k:   trains both;  sends A_k (r_k, n), B_k (m, r_k)
    server:   U Σ Vᵀ = 1/K Σ_k B_k A_k, cut to the run's rank;  flexlora: A = Vᵀ, B = U Σ    hlora: A = √Σ Vᵀ, B = U √Σ

The mean is of the products, so that nothing is lost by averaging factors. The decomposition is that of the stacked factors: with
R = Σ_k r_k, QR of [B_1 … B_K] (m, R) and of the stacked A (R, n), and the singular values of an (R, R) core. Components are in
order of their singular values: the first r_k of them are the best product of rank r_k that a site can be sent.

What is cut is lost, and biases the run: the mean of K products has a rank up to R, of which the run's rank is kept; and a site of
rank r_k starts from the first r_k components, so that its part of the mean has nothing of the others, which shrink by the share
of sites that do not hold them. That Σ is split evenly, or left with B, is our choice; the product is the same.
Components of singular value zero keep the run's last rows of A, with zero columns of B, so that they can train.

Safe under record-level DP as published: all of it works on released factors. Weights are uniform, as record counts would leak.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lalora_flwr.adapter.slots import LORA_A, LORA_B, factors_of
from lalora_flwr.methods.hetlora import PerEntry
from lalora_flwr.methods.merges import Memory, Merged, Now
from lalora_flwr.methods.method import Method
from lalora_flwr.methods.parts import PARTS
from lalora_flwr.methods.schedules import BOTH
from lalora_flwr.methods.updates import Factors, Tensors, Updates, factors_sent, stacked

TINY = 1e-9  # of the largest singular value: below it is rounding


class Products(PerEntry):
    """The mean of the products B A over the sites that trained either factor; of other slots the mean."""

    rewrites, moves_frozen = True, True
    needs_parts = frozenset({LORA_A, LORA_B})

    def __init__(self, name: str, *, split: bool) -> None:
        """
        Args:
            name: of the merge.
            split: whether both factors get a root of the singular values, or B all of them.
        """
        self.name, self._split = name, split

    def __call__(self, current: Tensors, updates: Updates, memory: Memory, now: Now) -> Merged:
        tensors = dict(super().__call__(current, updates, memory, now).tensors)
        for name_A, name_B in factors_of(now.layout):
            if pairs := factors_sent(updates.each, current, name_A, name_B):
                A, B = merged_factors(pairs, current[name_A], split=self._split)
                tensors[name_A], tensors[name_B] = A.astype(np.float32), B.astype(np.float32)
        return Merged(tensors, rewritten=True)


def merged_factors(pairs: Sequence[Factors], last: NDArray[np.floating], *, split: bool) -> Factors:
    """Factors of the mean of products, cut to a rank, without forming a product.

    Args:
        pairs: A_k (r_k, n) and B_k (m, r_k) of each site; at least one.
        last: of shape (r, n); its rows stand where the mean has fewer than r components.
        split: as `Products`.

    Returns:
        A of shape (r, n) and B of shape (m, r), float64, components in order of their singular values.
    """
    all_A, all_B = stacked(pairs)
    Q_B, R_B = np.linalg.qr(all_B / len(pairs))
    Q_A, R_A = np.linalg.qr(all_A.T)
    U, S, W = np.linalg.svd(R_B @ R_A.T, full_matrices=False)
    least = TINY * S[0]
    kept = min(len(last), int(np.count_nonzero(least < S)))
    root = np.sqrt(S[:kept]) if split else S[:kept]
    A, B = last.astype(np.float64), np.zeros((len(all_B), len(last)))
    A[:kept] = (W[:kept] * (root[:, None] if split else 1.0)) @ Q_A.T
    B[:, :kept] = (Q_B @ U[:, :kept]) * root
    return A, B


PRODUCT_SVD = Products("product-svd", split=False)
PRODUCT_SVD_SPLIT = Products("product-svd-split", split=True)
METHOD = Method(schedule=BOTH, travel=PARTS, merge=PRODUCT_SVD)
HLORA = Method(schedule=BOTH, travel=PARTS, merge=PRODUCT_SVD_SPLIT)
