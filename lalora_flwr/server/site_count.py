"""What the server counts of one site."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Asked = dict[str, dict[str, Any]]  # by site: how often it was asked for what


@dataclass
class SiteCount:
    """What the server knows of one site.

    Attributes:
        rounds: training rounds the site was asked for. All count, answered or not: what it sent may have been lost on the way.
        shares: how many of them asked for what share of a noise that sites have together: noise multiplier (its ``repr``, as
            JSON has texts for names) to rounds. Empty where each has its own.
        evaluations: how often it was asked to evaluate.
        local_steps: that the site takes in a round, by its profile; 0: the run's.
        spared: how many fewer steps its rounds asked for than as many rounds of the run's own steps.
        heard: whether it ever sent tensors.
        noise_multiplier: the smallest σ it named that the run prescribes for its q; None before the first.
        sample_rate: its q, which stays the same for the whole run; None before the first that can be.
        evaluation_noise: the smallest σ it named for an accuracy; None if it sent none with noise.
        claimed_steps, claimed_epsilon: from the newest reply whose counters can be true; for show only.
    """

    rounds: int = 0
    shares: dict[str, int] = field(default_factory=dict)
    evaluations: int = 0
    local_steps: int = 0
    spared: int = 0
    heard: bool = False
    noise_multiplier: float | None = None
    sample_rate: float | None = None
    evaluation_noise: float | None = None
    claimed_steps: int | None = None
    claimed_epsilon: float | None = None

    def add_share(self, multiplier: float) -> None:
        """Count a round with a share of a noise."""
        self.shares[repr(multiplier)] = self.shares.get(repr(multiplier), 0) + 1

    @property
    def takes_all(self) -> bool:
        """Whether it was asked for no fewer steps than the run has."""
        return not self.spared

    def add_round(self, local_steps: int, most: int) -> None:
        """Count a round of so many steps, of the run's ``most``."""
        self.rounds, self.local_steps, self.spared = self.rounds + 1, local_steps, self.spared + most - local_steps


def asked_of(count: SiteCount, before: dict[str, Any] | None) -> dict[str, Any]:
    """How often a site was asked, as plain JSON."""
    more = {"shares": count.shares, "spared": count.spared, "before": before}
    return {"rounds": count.rounds, "evaluations": count.evaluations, **{name: value for name, value in more.items() if value}}
