"""DiSK as published (arXiv 2410.03883): an average over the steps, and in each gradient how the last step has changed it.

κ = 0.7 unless named (``kalman:κ``), γ = 0.5. At step t, of all slots that train, with d = x_t - x_{t-1} and d = 0 at the first:

    g_j = w ∇ℓ_j(x_t + γ d) + (1 - w) ∇ℓ_j(x_t),   w = (1 - κ)/(κ γ),   of each record j of one batch
    g   = (Σ_j clip(g_j, C) + N(0, σ²C² I)) / expected batch size
    m_t = (1 - κ) m_{t-1} + κ g,   m_0 = g,   step along m_t

x_{t-1} is where the site has taken its last gradient, also in an earlier round: what the server's merge has moved is in d, too.
For κ = 1/(1 + γ) the gradient is taken ahead alone, and the step under plain SGD is a running average (`over_time`).

Safe under record-level DP as published, at the ε of any other filter: both points are functions of releases, so g_j is a function
of record j alone; it is clipped once, as one vector, and let out once, with sensitivity C. It takes two passes of the model a
step. The memory is x and m of each slot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.filters import State
from lalora_flwr.methods.over_time import Disk
from lalora_flwr.methods.schedules import MOST_LOOKED_AT

if TYPE_CHECKING:
    from torch import Tensor

    from lalora_flwr.adapter.slots import Layout
    from lalora_flwr.methods.method import Method
    from lalora_flwr.settings import Settings

GAMMA = 0.5
LAST = "last"  # what is remembered beside the average: where the last gradient was taken


class Kalman(Disk):
    """The average of `Disk`, of gradients that are taken at two points."""

    @property
    def ahead_share(self) -> float:
        return (1 - self.share) / (self.share * GAMMA)

    def ahead(self, value: Tensor, state: State) -> Tensor | None:
        last = state.get(LAST)
        state[LAST] = value.clone()
        if last is None or last.shape != value.shape:
            return None
        return value + GAMMA * (value - last.to(value))

    def check(self, method: Method, layout: Layout, settings: Settings) -> None:
        key = f"filter.name = {self.name!r}"
        if settings.server_steps:
            raise ConfigError(
                f"{key}: sites take gradients ahead of the adapter, so the step is theirs; set train.step-at = 'site'"
            )
        if settings.lora.dropout:
            raise ConfigError(f"{key}: compares gradients at two points, each of another dropout; set lora.dropout = 0")
        directive, steps = method.merge.start(layout), settings.train.local_steps
        rounds = range(1, min(settings.num_rounds, MOST_LOOKED_AT) + 1)
        if directive or len({mask for t in rounds for mask in method.schedule.masks(layout, t, steps, directive)}) > 1:
            raise ConfigError(f"{key}: the same slots must train at every step; set lora.schedule = 'both', 'B' or 'A'")


KALMAN = Kalman("kalman", 0.7)
