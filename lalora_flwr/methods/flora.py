"""FLoRA (arXiv 2409.05976): the sites' factors are stacked, their product goes into the frozen weights, and new factors begin.

    site i:   trains A and B as DP-LoRA, on W0 + (α/r) (B A + D);  sends A_i, B_i
    server:   D = D + [B_1 … B_n] [A_1; …; A_n] / n;   A drawn anew from the run's seed,  B = 0;   sends A, B, D

The stacked product is the sum of the B_i A_i, so that the mean of the sites' models is exact. The paper sends the stack to the
sites, which add it to weights that they keep; here they keep nothing, and D is the sum of all stacks
(`lalora_flwr.adapter.lora_residual`). Noise that has entered D stays there. It is post-processing of released factors, and safe
under record-level DP as published. Left out: sites with ranks of their own.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from lalora_flwr.adapter.lora_residual import LORA_D, residuals_of
from lalora_flwr.adapter.slots import Slot
from lalora_flwr.ground.seeds import derive_seed
from lalora_flwr.methods.fedex import Folding, mean_product
from lalora_flwr.methods.merges import Mean, Memory, Merged, Now
from lalora_flwr.methods.schedules import BOTH
from lalora_flwr.methods.travel import EVERYTHING_DOWN
from lalora_flwr.methods.updates import Tensors, Updates


class Stacked(Mean):
    """The mean product, in the frozen weights; of what is no factor the mean."""

    name = "stack"
    needs_parts = frozenset({LORA_D})
    moves_frozen = True
    needs_each = True
    takes_gradients = False
    rewrites = True

    def __call__(self, current: Tensors, updates: Updates, memory: Memory, now: Now) -> Merged:
        tensors = dict(super().__call__(current, updates, memory, now).tensors)
        for name_A, name_B, name_D in residuals_of(now.layout):
            tensors[name_D] = (current[name_D] + mean_product(updates.each, current, name_A, name_B)).astype(np.float32)
            tensors[name_A] = drawn(now.layout[name_A], now)
            tensors[name_B] = np.zeros(now.layout[name_B].shape, dtype=np.float32)
        return Merged(tensors, rewritten=True)


def drawn(slot: Slot, now: Now) -> NDArray[np.float32]:
    """A for the next round, (r, n), of LoRA's own distribution: uniform within 1/√n of zero."""
    bound = 1 / math.sqrt(slot.shape[1])
    draw = np.random.default_rng(derive_seed(now.seed, "flora", now.server_round, slot.name))
    return draw.uniform(-bound, bound, slot.shape).astype(np.float32)


METHOD = Folding(schedule=BOTH, travel=EVERYTHING_DOWN, merge=Stacked(), form="lora-residual")
