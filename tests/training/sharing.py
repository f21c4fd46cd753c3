"""Passes of made-up sites."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.gradients.records import Owners
from lalora_flwr.training.learner import Learner
from lalora_flwr.training.together import Apart, Pass


def a_pass(learner: Learner, seed: int, records: int, part: str = "lora_B") -> Pass:
    """A site's, with values that no other site has."""
    generator, site = torch.Generator().manual_seed(seed), Apart(learner.adapter)
    with torch.no_grad():
        for value in site.parameters.values():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    site.activate(learner.adapter.layout.of(part))
    return Pass(learner, site, *learner.base.synthetic_batch(records, generator))


def ticking(seconds: float) -> Callable[[], float]:
    """A clock on which every pass takes as long, however many records it has."""
    ticks = itertools.count()
    return lambda: next(ticks) * seconds


class Blind(PerSampleGradients):
    """Lets all records meet the model's own values, as a layer's rule would that does not know of sites."""

    def __init__(self, engine: PerSampleGradients) -> None:
        self._engine = engine
        self.owned = engine.owned

    def __call__(self, records: int, losses: Callable[[], Tensor], owners: Owners | None = None) -> dict[str, Tensor]:
        return self._engine(records, losses)
