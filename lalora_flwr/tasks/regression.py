"""Regression: a number per record, within bounds that are public."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lalora_flwr.tasks.problem import Problem

NARROW = (torch.float32, torch.float16)  # types of columns that hold fewer digits than the range has
TOLERANCE = 0.1  # of the range: how far a guess may be off to be right


@dataclass(frozen=True)
class Regression(Problem):
    """Targets are numbers from -1, the lower end of the range, to 1, the upper one; float32 (n,).

    The model learns them in this unit, so that one learning rate and one clip norm fit ages and prices alike; the range comes
    from the settings, never from records. A record's loss is the squared error.

    Attributes:
        low, high: the ends of the range, which belong to it.
    """

    low: float
    high: float

    name = "regression"
    transformers_name = "regression"
    named = False
    unknown = "its number is none, or beyond the range"

    def outputs(self, labels: object) -> int:
        return 1

    @property
    def middle(self) -> float:
        return self.low + self.half

    @property
    def half(self) -> float:
        """Half the width of the range: what 1 in the model's unit stands for."""
        return (self.high - self.low) / 2

    def why(self, text: str, classes: Mapping[str, int]) -> str:
        return f"no number from {self.low:g} to {self.high:g}; see data.label and data.label-range"

    def target(self, text: str, classes: Mapping[str, int]) -> float | None:
        try:
            value = float(text) if "_" not in text else math.nan  # which Python takes between digits
        except ValueError:
            return None
        if not self.low <= value <= self.high:
            value = self._rounded_ends.get(value, value)
        return (value - self.middle) / self.half if self.low <= value <= self.high else None

    @cached_property
    def _rounded_ends(self) -> dict[float, float]:
        """What the ends are in a column of float32 or float16, which may lie beyond them: 0.1 is then 0.10000000149."""
        ends = {torch.tensor(end, dtype=kind).item(): end for end in (self.low, self.high) for kind in NARROW}
        return {rounded: end for rounded, end in ends.items() if math.isfinite(rounded)}

    def refusal(self, targets: Tensor, classes: int) -> str:
        inside = targets.dim() == 1 and bool((targets.abs() <= 1).all())
        return "" if inside else "gives labels that are no numbers from -1 to 1, the ends of its range; must be (records,)"

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (logits.squeeze(1) - targets.to(logits.dtype)).square()

    def made_up(self, n: int, outputs: int) -> Tensor:
        return torch.linspace(-1, 1, n)

    def right(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Those whose guess is off by at most a tenth of the range."""
        return (logits.squeeze(1) - targets).abs() <= 2 * TOLERANCE

    def metrics(self, logits: Tensor, targets: Tensor) -> dict[str, float]:
        """``r2``; ``mae`` and ``rmse`` in the unit of the records; ``pearson``; ``within_tenth``, the share of `right`."""
        guesses, truth = logits.squeeze(1).double(), targets.double()
        errors = guesses - truth
        spread = (truth - truth.mean()).square().mean()
        spreads = guesses.std(correction=0) * truth.std(correction=0)
        shared = ((guesses - guesses.mean()) * (truth - truth.mean())).mean()
        return {
            "r2": float(1 - errors.square().mean() / spread) if spread else math.nan,
            "mae": float(errors.abs().mean()) * self.half,
            "rmse": float(errors.square().mean().sqrt()) * self.half,
            "pearson": float(shared / spreads) if spreads else math.nan,
            "within_tenth": float(self.right(logits, targets).double().mean()),
        }

    def groups(self, targets: Tensor) -> list[float]:
        return [float(target) for target in targets]

    def counts(self, targets: Tensor, classes: int) -> tuple[int, ...]:
        return ()
