"""Which tuned value wins, for each combination on its own."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lalora_flwr.compare.cells import Labels, Role, Tuned
from lalora_flwr.settings import Value

WORST = -math.inf


@dataclass(frozen=True)
class Choice:
    """The winner of a combination (None: no value has a finished set of runs), and every value's mean score.

    ``edge``: the winner is the first or the last number of an axis, so that a better one may lie beyond the grid.
    """

    winner: Tuned | None
    edge: bool
    means: Mapping[Tuned, float]


def mean_score(scores: Sequence[float | None]) -> float:
    """Mean over the seeds; a value at which a run failed or diverged (None, NaN) is worse than any other."""
    if not scores or any(a is None or not math.isfinite(a) for a in scores):
        return WORST
    return statistics.fmean(a for a in scores if a is not None)


def choose(scores: Mapping[Tuned, Sequence[float | None]], axes: Mapping[str, tuple[Value, ...]]) -> Choice:
    """The value with the highest mean; of equal ones the first on its axis, which is the smaller number.

    Args:
        scores: last-round headline metrics of the tuning runs by tuned value, in the order of the axes.
        axes: all values tried, by key.
    """
    means = {tuned: mean_score(found) for tuned, found in scores.items()}
    order = sorted(means, key=lambda tuned: [axes[key].index(value) for key, value in tuned])
    best = max(order, key=lambda tuned: means[tuned], default=None)  # max keeps the first of equals
    if best is None or means[best] == WORST:
        return Choice(None, False, means)
    return Choice(best, any(_at_edge(value, axes[key]) for key, value in best), means)


def _at_edge(value: Value, axis: tuple[Value, ...]) -> bool:
    ordered = all(isinstance(v, int | float) and not isinstance(v, bool) for v in axis)
    return ordered and len(axis) > 1 and value in (axis[0], axis[-1])


def choose_all(
    roles: Sequence[Role], by_cell: Mapping[str, float | None], axes: Mapping[str, tuple[Value, ...]]
) -> dict[Labels, Choice]:
    """The choice of every combination, from the scores of the tuning cells by cell name (missing: failed)."""
    scores: dict[Labels, dict[Tuned, list[float | None]]] = {}
    for role in roles:
        scores.setdefault(role.labels, {}).setdefault(role.tuned, []).append(by_cell.get(role.cell.name))
    return {labels: choose(by_value, axes) for labels, by_value in scores.items()}
