"""FedEx-LoRA (arXiv 2410.09432): what the mean of the factors loses against the mean of the products goes into the frozen
weights.

    site i:   trains A and B as DP-LoRA, on W0 + (α/r) (B A + D);  sends A_i, B_i
    server:   A = mean of A_i,  B = mean of B_i,  D = D + mean(B_i A_i) - B A;   sends A, B, D

So the next round starts from the mean of the sites' models. D, which is zero at first, is a slot that never trains
(`lalora_flwr.adapter.lora_residual`, which says what it costs). The paper's sites add each round's residual to weights that they
keep; here they keep nothing, and D is the sum of all of them. It is post-processing of released factors, and safe under
record-level DP as published. The noise of the product, N_B N_A, is averaged with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lalora_flwr.adapter.lora_residual import LORA_D, residuals_of
from lalora_flwr.adapter.slots import Layout, factors_of
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.merges import Mean, Memory, Merged, Now
from lalora_flwr.methods.method import Method
from lalora_flwr.methods.schedules import BOTH, MOST_LOOKED_AT
from lalora_flwr.methods.travel import EVERYTHING_DOWN
from lalora_flwr.methods.updates import Tensors, Updates, factors_sent, sum_of_products
from lalora_flwr.settings import Settings


class WithResiduals(Mean):
    """The mean, and of each layer the rest of the mean product."""

    name = "mean-and-residual"
    needs_parts = frozenset({LORA_D})
    moves_frozen = True
    needs_each = True
    takes_gradients = False

    def __call__(self, current: Tensors, updates: Updates, memory: Memory, now: Now) -> Merged:
        tensors = dict(super().__call__(current, updates, memory, now).tensors)
        for name_A, name_B, name_D in residuals_of(now.layout):
            if pairs := factors_sent(updates.each, current, name_A, name_B):
                A, B = (np.asarray(tensors.get(name, current[name]), dtype=np.float64) for name in (name_A, name_B))
                rest = sum_of_products(pairs) / len(pairs) - B @ A
                tensors[name_D] = (current[name_D] + rest).astype(np.float32)
        return Merged(tensors)


@dataclass(frozen=True)
class Folding(Method):
    """A method whose merge folds something into the frozen weights, without which its form only costs bytes."""

    def check(self, settings: Settings) -> None:
        if settings.merge.name != "auto":
            raise ConfigError(
                f"merge.name = {settings.merge.name!r}: must be 'auto' for strategy = {settings.strategy!r}, which is its merge"
            )
        super().check(settings)


class FedEx(Folding):
    """The method, which is for sites that train both factors in one round."""

    def check_moves(self, layout: Layout, settings: Settings) -> None:
        super().check_moves(layout, settings)
        steps, rounds = settings.train.local_steps, range(1, min(settings.num_rounds, MOST_LOOKED_AT) + 1)
        trained = [self.schedule.trained_in(layout, t, steps, {}) for t in rounds]
        if not any(mask.issuperset(pair) for mask in trained for pair in factors_of(layout)):
            raise ConfigError(
                f"lora.schedule = {settings.lora.schedule!r}: no round trains A and B, so that their means are exact and leave "
                f"no residual; choose another for strategy = {settings.strategy!r}, or more train.local-steps"
            )


METHOD = FedEx(schedule=BOTH, travel=EVERYTHING_DOWN, merge=WithResiduals(), form="lora-residual")
