"""What a site has spent. Training asks here before every noised step, and every step is counted here.

`Ledger` is the seam. `RunLedger` counts for one run; in a simulation it lives in Flower's per-site state. The durable
ledger of a real site is `lalora_flwr.ledger.site_ledger`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lalora_flwr.ground.errors import BudgetExhausted
from lalora_flwr.privacy.accounting import epsilon_spent
from lalora_flwr.privacy.events import SampledGaussian, Target

Compose = Callable[[Sequence[SampledGaussian], float, str], float]  # steps, δ, accountant -> ε; as `epsilon_spent`


class Ledger(Protocol):
    """Reserve → train → commit. A crash in between leaves the whole reservation counted: over-, never under-counting."""

    def reserve(self, noise_multiplier: float, sample_rate: float, steps: int) -> None:
        """Count ``steps`` steps of a Gaussian mechanism before the first of them is taken.

        Raises:
            BudgetExhausted: if they would exceed what the site may spend; nothing is counted then.
            ValueError: if these are no steps: fewer than one would take counted steps back.
        """

    def take_step(self) -> None:
        """Called before each release of a noised gradient.

        Raises:
            BudgetExhausted: if no reserved step is left.
        """

    def commit(self) -> None:
        """Give back the reserved steps that were not taken."""

    def epsilon(self) -> float:
        """ε spent so far, open reservations included."""


class RunLedger:
    """Counts the steps of one site in one run, up to the ε and the steps of its target.

    Guarantee: `epsilon` composes every step for which `take_step` returned, with the σ and q it was reserved at.
    """

    def __init__(self, limit: Target, history: Sequence[SampledGaussian] = (), compose: Compose = epsilon_spent) -> None:
        self._limit = limit
        self._history: list[SampledGaussian] = list(history)
        self._compose = compose
        self._reserved = 0  # steps of the last segment that are counted and not yet taken

    @property
    def steps(self) -> int:
        """Steps counted so far, open reservations included."""
        return sum(event.steps for event in self._history)

    @property
    def left(self) -> int:
        """Reserved steps that were not taken yet."""
        return self._reserved

    def reserve(self, noise_multiplier: float, sample_rate: float, steps: int) -> None:
        if self._reserved:
            raise RuntimeError("a reservation is open: commit it first")
        new = SampledGaussian(noise_multiplier, sample_rate, steps)
        new.check()
        if not steps:
            raise ValueError("no step to reserve")
        history = _extend(self._history, new)
        if sum(event.steps for event in history) > self._limit.steps:
            raise BudgetExhausted("budget: the site has served all the steps its noise was calibrated for")
        if self._limit.epsilon != math.inf and not self._epsilon_of(history) <= self._limit.epsilon:  # NaN is not <=
            raise BudgetExhausted("budget: the steps would exceed the largest epsilon the site may spend")
        self._history, self._reserved = history, steps

    def take_step(self) -> None:
        if not self._reserved:
            raise BudgetExhausted("budget: no reserved step is left")
        self._reserved -= 1

    def commit(self) -> None:
        if self._reserved:
            last = self._history[-1]
            self._history[-1] = last._replace(steps=last.steps - self._reserved)
        self._reserved = 0

    def epsilon(self) -> float:
        return self._epsilon_of(self._history)

    def _epsilon_of(self, history: Sequence[SampledGaussian]) -> float:
        return self._compose(history, self._limit.delta, self._limit.accountant)

    def state(self) -> dict[str, list[float] | list[int]]:
        """The counted steps as three lists, for Flower's per-site state."""
        columns = list(zip(*self._history, strict=True)) or [(), (), ()]
        return {name: list(column) for name, column in zip(_COLUMNS, columns, strict=True)}


_COLUMNS = ("noise-multiplier", "sample-rate", "steps")


def history_from(state: Mapping[str, Any]) -> list[SampledGaussian]:
    """The steps that `RunLedger.state` wrote."""
    return [SampledGaussian(float(s), float(q), int(n)) for s, q, n in zip(*(state[name] for name in _COLUMNS), strict=True)]


def _extend(history: Sequence[SampledGaussian], new: SampledGaussian) -> list[SampledGaussian]:
    """The history with steps added, joined to the last ones if they are of the same kind."""
    if history and history[-1][:2] == new[:2]:
        return [*history[:-1], new._replace(steps=history[-1].steps + new.steps)]
    return [*history, new]


def at_least(
    history: Sequence[SampledGaussian], steps: int, sigma: float, q: float, before: Sequence[SampledGaussian] = ()
) -> list[SampledGaussian]:
    """The history with the steps added that it lacks to hold ``steps`` in all, and those ``before``; never fewer than it holds.

    What is added is at σ and q, but for what the history lacks of those before.
    """
    found = list(history)
    for event in before:
        known = sum(own.steps for own in history if own[:2] == event[:2])
        if event.steps > known:
            found = _extend(found, event._replace(steps=event.steps - known))
    missing = steps - sum(event.steps for event in found)
    return _extend(found, SampledGaussian(sigma, q, missing)) if missing > 0 else found
