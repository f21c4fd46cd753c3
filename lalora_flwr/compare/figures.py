"""Pictures of a comparison. One that would have nothing to compare is not drawn."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lalora_flwr.compare.results import Result, by_epsilon, by_method, metric_name
from lalora_flwr.compare.table import spread
from lalora_flwr.ground.figures import Style, as_label, blank, plain, styles_of, whole_numbers
from lalora_flwr.ground.words import epsilon_label
from lalora_flwr.server.metrics import HEADLINES

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROUND, PRIVACY, BYTES, RATE = "by-round", "by-epsilon", "by-bytes", "by-learning-rate"
MIXED = "score"  # of runs whose tasks have different metrics
NAMES = tuple(f"{metric}-{by}" for metric in (*HEADLINES, MIXED) for by in (ROUND, PRIVACY, BYTES, RATE))
FROZEN = "frozen model"
LOWEST = -100.0  # per cent that are shown of a metric without a lower bound, such as R²
LETTERS_PER_INCH, LINE = 15, 0.2  # of a legend: letters beside each other, and inches of a line


def figures(results: Sequence[Result]) -> Iterator[tuple[str, Figure]]:
    """Names and matplotlib figures of all plots that make sense for these runs; a name begins with the metric."""
    metrics = {result.summary.metric for result in results if result.summary}
    metric = metrics.pop() if len(metrics) == 1 else MIXED
    usable = [result for result in results if result.score is not None]
    final = [result for result in usable if result.is_final]
    styles = styles_of([result.method for result in results])
    stems = styles_of([result.stem for result in results])
    if final:
        yield f"{metric}-{ROUND}", by_round(final, styles)
        if len(by_epsilon(final)) > 1:
            yield f"{metric}-{PRIVACY}", by_privacy(final, styles)
        yield f"{metric}-{BYTES}", by_bytes(final, styles)
    tried = [result for result in usable if result.is_tuning] or final
    tried = [result for result in tried if result.lr]  # a rate by rule has no place on the axis
    if any(len({r.lr for r in runs}) > 1 for _, runs in _stems(tried)):
        yield f"{metric}-{RATE}", by_learning_rate(tried, final if tried is not final else [], stems)


def _stems(results: Sequence[Result]) -> Iterator[tuple[tuple[str, float], list[Result]]]:
    found: dict[tuple[str, float], list[Result]] = {}
    for result in results:
        found.setdefault((result.stem, result.epsilon), []).append(result)
    yield from found.items()


def _panels(epsilons: Sequence[float], xlabel: str, metric: str) -> tuple[Figure, dict[float, Axes]]:
    """One panel an ε, up to three in a row, on one scale."""
    columns = min(3, len(epsilons))
    rows = math.ceil(len(epsilons) / columns)
    figure = blank(1.2 + 3.6 * columns if columns > 1 else 6, 0.9 + 3 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for spare in grid[len(epsilons) :]:
        spare.remove()
    for index, axes in enumerate(grid[: len(epsilons)]):
        plain(axes)
        axes.set_title(epsilon_label(epsilons[index], said=True), fontsize=10)
        if index + columns >= len(epsilons):
            axes.set_xlabel(xlabel)
            axes.tick_params(labelbottom=True)
        if index % columns == 0:
            axes.set_ylabel(f"test {metric} (%)")
    return figure, dict(zip(epsilons, grid, strict=False))


def _legend(figure: Figure, axes: Sequence[Axes], note: str) -> None:
    """One legend for all panels above them, for which the figure grows, and below them what its bands and bars are."""
    found: dict[str, Artist] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if FROZEN in found:
        found[FROZEN] = found.pop(FROZEN)  # last
    width, height = figure.get_size_inches()
    room = int(width * LETTERS_PER_INCH) - 6  # letters of a line beside the sign before it
    labels = ["\n".join(textwrap.wrap(label, room)) for label in found]
    longest = max((len(line) for label in labels for line in label.splitlines()), default=1)
    columns = max(1, min(len(found), int(width * LETTERS_PER_INCH / (longest + 7))))
    lines = sum(1 + max(label.count("\n") for label in labels[i : i + columns]) for i in range(0, len(labels), columns))
    figure.set_size_inches(width, height + LINE * max(0, lines - 1) + LINE)
    figure.legend(found.values(), labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    figure.text(0.5, 0.005, note, ha="center", va="bottom", fontsize=8, color="0.35")
    for panel in axes:
        if panel.get_ylim()[0] < LOWEST:
            panel.set_ylim(bottom=LOWEST)
            panel.text(0.02, 0.02, f"below {LOWEST:g} not shown", transform=panel.transAxes, fontsize=7, color="0.35")
    below = LINE / figure.get_size_inches()[1]
    figure.set_layout_engine("constrained", rect=(0, below, 1, 1 - below))


def _note(runs: Iterable[Result], what: str) -> str:
    """What bands or bars are, or why there are none."""
    seeds = {result.values["seed"] for result in runs}
    return f"{what}: ± one standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "one seed, so without a spread"


def _band(axes: Axes, xs: Sequence[float], means: Sequence[float], stds: Sequence[float], colour: str) -> None:
    low, high = [m - s for m, s in zip(means, stds, strict=True)], [m + s for m, s in zip(means, stds, strict=True)]
    axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)


def _frozen(axes: Axes, results: Sequence[Result]) -> None:
    found = {value for result in results if (value := result.frozen_score) is not None}
    if len(found) == 1:
        axes.axhline(100 * found.pop(), linestyle=(0, (4, 3)), linewidth=1, color="0.45", label=FROZEN, zorder=1)


Point = tuple[float, float]


def _curves(
    results: Sequence[Result], points: Callable[[Result], list[Point]]
) -> Iterator[tuple[str, list[float], list[float], list[float]]]:
    """For each method x, mean and standard deviation over the seeds, at steps that every seed has evaluated."""
    for method, runs in by_method(results):
        curves = [curve for run in runs if (curve := points(run))]
        steps = min((len(curve) for curve in curves), default=0)
        if not steps:
            continue
        xs = [statistics.fmean(curve[i][0] for curve in curves) for i in range(steps)]
        at = [[100 * curve[i][1] for curve in curves] for i in range(steps)]
        yield method, xs, [statistics.fmean(a) for a in at], [statistics.stdev(a) if len(a) > 1 else 0.0 for a in at]


def _round_points(result: Result) -> list[Point]:
    return [(line.round, line.score) for line in result.metrics if line.score is not None]


def _byte_points(result: Result) -> list[Point]:
    sent, points = 0, []
    for line in result.metrics:
        sent += line.bytes_up
        if line.score is not None:
            points.append((sent / 1e6, line.score))
    return points


def by_round(final: Sequence[Result], styles: Mapping[str, Style]) -> Figure:
    """Score against round, with a band of one standard deviation."""
    groups = by_epsilon(final)
    figure, panels = _panels(list(groups), "round", metric_name(final))
    for epsilon, results in groups.items():
        axes = panels[epsilon]
        whole_numbers(axes)
        for method, xs, means, stds in _curves(results, _round_points):
            axes.plot(xs, means, label=as_label(method), markevery=max(1, len(xs) // 8), **styles[method])
            _band(axes, xs, means, stds, styles[method]["color"])
        _frozen(axes, results)
    _legend(figure, list(panels.values()), _note(final, "bands"))
    return figure


def by_bytes(final: Sequence[Result], styles: Mapping[str, Style]) -> Figure:
    """Score against what all sites have sent up so far, with a band of one standard deviation."""
    groups = by_epsilon(final)
    figure, panels = _panels(list(groups), "sent up by all sites (MB)", metric_name(final))
    for epsilon, results in groups.items():
        for method, xs, means, stds in _curves(results, _byte_points):
            panels[epsilon].plot(xs, means, label=as_label(method), markevery=max(1, len(xs) // 8), **styles[method])
            _band(panels[epsilon], xs, means, stds, styles[method]["color"])
        _frozen(panels[epsilon], results)
    _legend(figure, list(panels.values()), _note(final, "bands"))
    return figure


def by_privacy(final: Sequence[Result], styles: Mapping[str, Style]) -> Figure:
    """Score of the last round against ε; without privacy is a place of its own at the end."""
    epsilons = list(by_epsilon(final))
    figure = blank(6.5, 4)
    axes = figure.subplots()
    plain(axes)
    names = list(styles)
    for method, runs in by_method(final):
        found = [(epsilons.index(eps), s) for eps, part in by_epsilon(runs).items() if (s := spread(part))]
        shift = 0.05 * (names.index(method) - (len(names) - 1) / 2) if len(names) < 12 else 0  # error bars beside each other
        axes.errorbar(
            [place + shift for place, _ in found],
            [100 * s.mean for _, s in found],
            yerr=[0 if math.isnan(s.std) else 100 * s.std for _, s in found],
            capsize=2.5,
            elinewidth=1,
            label=as_label(method),
            **styles[method],
        )
    _frozen(axes, final)
    axes.set_xticks(range(len(epsilons)), ["none" if math.isinf(eps) else f"{eps:g}" for eps in epsilons])
    axes.set(xlabel="ε (none: without privacy)", ylabel=f"test {metric_name(final)} (%)")
    axes.margins(x=0.08)
    _legend(figure, [axes], _note(final, "bars"))
    return figure


def by_learning_rate(tried: Sequence[Result], final: Sequence[Result], styles: Mapping[str, Style]) -> Figure:
    """Mean score against the learning rate; a ring marks what the final runs used."""
    groups = by_epsilon(tried)
    figure, panels = _panels(list(groups), "learning rate", metric_name(tried))
    chosen = {(result.stem, result.epsilon): result.lr for result in final}
    ticks = sorted({result.lr for result in tried})
    for (stem, epsilon), runs in _stems(tried):
        rates = sorted({run.lr for run in runs})
        at = {lr: spread([run for run in runs if run.lr == lr]) for lr in rates}
        spreads = [s for s in at.values() if s]
        means = [100 * s.mean for s in spreads]
        panels[epsilon].plot(rates, means, label=as_label(stem), **styles[stem])
        stds = [0 if math.isnan(s.std) else 100 * s.std for s in spreads]
        _band(panels[epsilon], rates, means, stds, styles[stem]["color"])
        best = chosen.get((stem, epsilon))
        if best in rates:
            ring: Style = {"marker": "o", "markersize": 12, "markerfacecolor": "none", "linestyle": "none"}
            panels[epsilon].plot([best], [means[rates.index(best)]], color=styles[stem]["color"], **ring)
    for axes in panels.values():
        axes.set_xscale("log")
        if len(ticks) <= 8:
            axes.set_xticks(ticks, [f"{lr:g}" for lr in ticks], rotation=45 if len(ticks) > 5 else 0)
            axes.minorticks_off()
    if chosen:
        next(iter(panels.values())).plot(
            [], [], color="0.3", marker="o", markersize=9, markerfacecolor="none", linestyle="none", label="chosen"
        )
    _legend(figure, list(panels.values()), _note(tried, "bands"))
    return figure
