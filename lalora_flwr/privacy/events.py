"""What is composed: steps of the one mechanism there is, and what a run calibrates its noise for."""

from __future__ import annotations

import math
from typing import NamedTuple


class SampledGaussian(NamedTuple):
    """Equal steps of the Poisson-subsampled Gaussian mechanism: each adds N(0, σ²C²) to a sum of records clipped to C.

    As flwr's ``GaussianPrivacyEvent`` and dp_accounting's ``DpEvent``. Ledgers hold it as [σ, q, steps].

    Attributes:
        noise_multiplier: σ.
        sample_rate: q, each record's probability of joining a step.
        steps: how many.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    @property
    def possible(self) -> bool:
        """Whether these can be steps of the mechanism; σ = 0 is training without privacy."""
        return 0 <= self.noise_multiplier < math.inf and 0 < self.sample_rate <= 1 and self.steps >= 0

    @property
    def noisy(self) -> bool:
        """Whether a site's ledger can count them: at least one, with noise."""
        return self.possible and self.noise_multiplier > 0 and self.steps >= 1

    def check(self) -> None:
        """
        Raises:
            ValueError: if they are not `possible`.
        """
        if not self.possible:
            sigma, q, steps = self
            raise ValueError(f"{steps} steps at σ = {sigma}, q = {q}: not steps of the mechanism")


class Target(NamedTuple):
    """What a run calibrates its noise for: ε at δ after the most steps that a site may take, by an accountant.

    Attributes:
        before: steps of another noise that come first; ``epsilon`` and ``steps`` hold for them and the others together.
    """

    epsilon: float
    delta: float
    steps: int
    accountant: str
    before: tuple[SampledGaussian, ...] = ()

    def begun(self, steps: int) -> tuple[SampledGaussian, ...]:
        """The first ``steps`` of those before."""
        found: list[SampledGaussian] = []
        for event in self.before:
            found.append(event._replace(steps=min(event.steps, steps)))
            steps -= found[-1].steps
        return tuple(event for event in found if event.steps)

    @property
    def alike(self) -> int:
        """The steps that are calibrated for: all but those before."""
        return self.steps - sum(event.steps for event in self.before)
