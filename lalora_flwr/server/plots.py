"""Pictures of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lalora_flwr.ground.figures import blank, whole_numbers
from lalora_flwr.ground.words import epsilon_label
from lalora_flwr.server.metrics import HEADLINES, Quality, RoundMetrics, headline
from lalora_flwr.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOWEST = -1.0  # that is shown of a metric without a lower bound, such as R²


def score_figure(settings: Settings, frozen: Quality, metrics: Sequence[RoundMetrics], *, seeded: bool) -> Figure:
    """The headline metric on public test records and ε spent, by round; what was there before it as a dashed line.

    Args:
        settings: the run's settings, for the title.
        frozen: the quality before training.
        metrics: one per round.
        seeded: whether the sites' noise followed from the run's seed, as only in a simulation.
    """
    figure = blank(7, 4)
    axes = figure.subplots()
    rounds = [0, *(line.round for line in metrics)]
    metric = headline(frozen)
    known = [(0, frozen.get(metric)), *((line.round, line.score) for line in metrics)]
    seen = [(number, score) for number, score in known if score is not None and math.isfinite(score)]
    axes.plot([number for number, _ in seen], [s for _, s in seen], marker="o", color="tab:blue", label=HEADLINES[metric])
    if seen and not seen[0][0]:
        axes.axhline(seen[0][1], linestyle="--", color="grey", label=settings.before_training)
    axes.set(xlabel="round", ylabel=f"test {HEADLINES[metric]}", ylim=(max(LOWEST, min([0.0, *(s for _, s in seen)])), 1))
    if (below := sum(score < LOWEST for _, score in seen)) > 0:
        note = f"below {LOWEST:g} and not shown: {below} of {len(seen)} values"
        axes.text(0.5, 0.97, note, transform=axes.transAxes, fontsize=8, color="0.35", ha="center", va="top")
    whole_numbers(axes)
    if settings.private:
        spent = axes.twinx()
        spent.plot(rounds, [0, *(line.epsilon for line in metrics)], color="tab:orange", label="ε spent")
        alone = [line.epsilon_alone for line in metrics]
        if any(value is not None for value in alone):
            label = "ε if all other sites collude"
            spent.plot(rounds, [0, *(value or 0 for value in alone)], color="tab:red", linestyle=":", label=label)
        spent.set(ylabel=f"ε spent (δ = {settings.privacy.delta:g}), largest over sites", ylim=(0, None))
        spent.legend(loc="lower right")
    axes.legend(loc="upper left")
    guarantee = epsilon_label(settings.privacy.epsilon)
    title = f"{settings.strategy}, {settings.model.name}, {settings.num_supernodes} sites, {guarantee}"
    axes.set_title(title + (", seeded" if seeded else ""))
    return figure
