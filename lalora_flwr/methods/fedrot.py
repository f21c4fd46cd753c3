"""FedRot-LoRA (arXiv 2602.23638): the sites' factors are turned towards each other before they are averaged.

    site i:   trains A and B as DP-LoRA;  sends A_i, B_i
    server:   R_i = argmin over orthogonal R of ‖Rᵀ A_i - A‖² + ‖B_i R - B‖²,  A and B being what the round started from
                  = U Vᵀ  with  U Σ Vᵀ = A_i Aᵀ + B_iᵀ B
              A = mean of R_iᵀ A_i,  B = mean of B_i R_i

B_i A_i = (B_i R_i)(R_iᵀ A_i), so that no site's product changes; what shrinks is how far the mean of the products is from the
product of the means. It is post-processing of released factors, and safe under record-level DP as published. The paper's sites
turn their own factors; here the server does, which gives the same mean and needs nothing of the sites. Left out: the paper's
weight that turns less than all the way.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lalora_flwr.adapter.slots import LORA_A, LORA_B, factors_of
from lalora_flwr.methods.merges import Mean, Memory, Merged, Now
from lalora_flwr.methods.method import Method
from lalora_flwr.methods.schedules import BOTH
from lalora_flwr.methods.updates import Tensors, Update, Updates, together


class Aligned(Mean):
    """The mean of factors that are turned towards those that the round started from."""

    name = "aligned-mean"
    needs_parts = frozenset({LORA_A, LORA_B})
    needs_each = True
    takes_gradients = False

    def __call__(self, current: Tensors, updates: Updates, memory: Memory, now: Now) -> Merged:
        turned = [Update(update.site, aligned_update(update.tensors, current, now)) for update in updates.each]
        return super().__call__(current, together(turned), memory, now)


def aligned_update(sent: Tensors, start: Tensors, now: Now) -> Tensors:
    """What a site sent, with the factors of each layer turned; a layer of which it sent one factor alone stays as it is."""
    tensors = dict(sent)
    for name_A, name_B in factors_of(now.layout):
        if name_A in sent and name_B in sent:
            R = rotation(sent[name_A], sent[name_B], start[name_A], start[name_B])
            tensors[name_A], tensors[name_B] = R.T @ sent[name_A], sent[name_B] @ R
    return tensors


def rotation(
    A: NDArray[np.floating], B: NDArray[np.floating], to_A: NDArray[np.floating], to_B: NDArray[np.floating]
) -> NDArray[np.float64]:
    """The orthogonal R (r, r) for which Rᵀ A and B R together are nearest to ``to_A`` and ``to_B``.

    Args:
        A, to_A: of shape (r, n).
        B, to_B: of shape (m, r).
    """
    A, B = A.astype(np.float64), B.astype(np.float64)
    U, _, Vt = np.linalg.svd(A @ to_A.T.astype(np.float64) + B.T @ to_B.astype(np.float64))
    return np.asarray(U @ Vt)


METHOD = Method(schedule=BOTH, merge=Aligned())
