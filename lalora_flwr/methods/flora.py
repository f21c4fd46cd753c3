"""FLoRA (arXiv 2409.05976): the sites' factors are stacked, their product goes into the frozen weights, and new factors begin.

    server:   sends D, the first r_i rows of A and columns of B
    site i:   trains both as DP-LoRA, on W0 + (α/r) (B_i A_i + D);  sends A_i (r_i, n), B_i (m, r_i)
    server:   D = D + [B_1 … B_n] [A_1; …; A_n] / n;   A drawn anew from the run's seed,  B = 0

r_i is the rank that the site's profile names, r that of the run. The stacked product is the sum of the B_i A_i, whatever their
ranks, so that the mean of the sites' models is exact, and nothing of it is cut to a rank. The mean of a layer is over the n sites
that trained it. The scale is the run's α/r at every site, so that a component means the same everywhere.

The paper weighs sites by their records, which would leak counts, and sends the stack to the sites, which add it to weights that
they keep; here they keep nothing, and D is the sum of all stacks (`lalora_flwr.adapter.lora_residual`). It goes down whole, also
to a site of a small rank, which saves only what it trains and sends. Noise that has entered D stays there.

It is post-processing of released factors, and safe under record-level DP as published.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lalora_flwr.adapter.lora_residual import LORA_D, residuals_of
from lalora_flwr.adapter.slots import LORA_B, Layout, Slot
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.seeds import derive_seed
from lalora_flwr.methods.fedex import Folding
from lalora_flwr.methods.hetlora import PerEntry
from lalora_flwr.methods.merges import Memory, Merged, Now
from lalora_flwr.methods.parts import PARTS
from lalora_flwr.methods.schedules import BOTH, MOST_LOOKED_AT
from lalora_flwr.methods.updates import Factors, Tensors, Updates, factors_sent, sum_of_products
from lalora_flwr.settings import Settings


class Stacked(PerEntry):
    """The mean product, in the frozen weights; of what is no factor the mean over the sites that trained it."""

    name = "stack"
    needs_parts = frozenset({LORA_D})
    moves_frozen = True
    stride_A = 1.8  # it begins anew in each round: what noise made of it before meets no later B; read off the digits
    rewrites = True

    def __call__(self, current: Tensors, updates: Updates, memory: Memory, now: Now) -> Merged:
        tensors = dict(super().__call__(current, updates, memory, now).tensors)
        for name_A, name_B, name_D in residuals_of(now.layout):
            if pairs := factors_sent(updates.each, current, name_A, name_B):
                stack = [*pairs, *left_out(pairs, current[name_A], current[name_B])]
                tensors[name_D] = (current[name_D] + sum_of_products(stack) / len(pairs)).astype(np.float32)
                tensors[name_A] = drawn(now.layout[name_A], now)
                tensors[name_B] = np.zeros(now.layout[name_B].shape, dtype=np.float32)
        return Merged(tensors, rewritten=True)


def left_out(pairs: Sequence[Factors], A: NDArray[np.floating], B: NDArray[np.floating]) -> Iterator[Factors]:
    """The components that the round started from, each as often as there are sites that do not hold it.

    Usually none, since B starts at zero; after ``lora.start-from`` they go into the frozen weights with the others.
    """
    sites = np.sum([np.arange(len(A)) >= len(own) for own, _ in pairs], axis=0)
    if (B * sites).any():
        yield A, B * sites


def drawn(slot: Slot, now: Now) -> NDArray[np.float32]:
    """A for the next round, (r, n), of LoRA's own distribution: uniform within 1/√n of zero."""
    bound = 1 / math.sqrt(slot.shape[1])
    draw = np.random.default_rng(derive_seed(now.seed, "flora", now.server_round, slot.name))
    return draw.uniform(-bound, bound, slot.shape).astype(np.float32)


class FLoRA(Folding):
    """The method, each of whose rounds begins with B = 0."""

    def check_moves(self, layout: Layout, settings: Settings) -> None:
        super().check_moves(layout, settings)
        steps = settings.train.local_steps
        for server_round in range(1 + settings.ridge_first, min(settings.num_rounds, MOST_LOOKED_AT) + 1):
            if not self.schedule.trained_in(layout, server_round, steps, {}) & layout.of(LORA_B):
                raise ConfigError(
                    f"lora.schedule = {self.schedule.text!r}: round {server_round} trains no lora_B, which begins at zero in "
                    f"every round of {settings.strategy}, and a step on lora_A alone would be lost; take both, or B"
                )


METHOD = FLoRA(schedule=BOTH, travel=PARTS, merge=Stacked(), form="lora-residual")
