"""Pictures of diagnoses, in the style of a comparison's. One that would show nothing is not drawn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lalora_flwr.diagnose.landscape import Landscape
from lalora_flwr.diagnose.noise import SPANS
from lalora_flwr.diagnose.table import Column, Value, share_of_product
from lalora_flwr.ground.figures import Style, as_label, blank, plain, styles_of, whole_numbers
from lalora_flwr.server.metrics import RoundMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UPDATES, NOISE, SHARPNESS, LINE, PLANE = (f"diagnosis-{name}" for name in ("updates", "noise", "sharpness", "line", "plane"))
NAMES = (UPDATES, NOISE, SHARPNESS, LINE, PLANE)
BY_ROUND: Mapping[str, Callable[[RoundMetrics], float | None]] = {
    "signal-to-noise of the mean update": lambda line: line.snr,
    "aggregation bias": lambda line: line.aggregation_bias,
    "cosine of sites' updates of A": lambda line: line.cosine_A,
    "cosine of sites' updates of B": lambda line: line.cosine_B,
}
STRETCH = 20.0  # a picture of losses ends at so many times the smallest, beyond which only how bad is to be seen
MOST_PLANES = 6


def figures(columns: Sequence[Column]) -> Iterator[tuple[str, Figure]]:
    """Names and matplotlib figures of all that there is to show."""
    styles = styles_of([column.name for column in columns])
    shown = [name for name, of in BY_ROUND.items() if any(_curve(column, of) for column in columns)]
    if shown:
        yield UPDATES, by_round(columns, shown, styles)
    if any(run.amplification.whole for column in columns for run in column.runs):
        yield NOISE, noise(columns, styles)
    yield SHARPNESS, sharpness(columns, styles)
    with_slice = [column for column in columns if _slices(column)]
    if with_slice:
        yield LINE, line(with_slice, styles)
        yield PLANE, plane(with_slice[:MOST_PLANES])


def _curve(column: Column, of: Callable[[RoundMetrics], float | None]) -> list[tuple[int, float, float]]:
    """Round, mean and standard deviation over the column's runs, at rounds that all of them have the number for."""
    found = []
    for lines in zip(*(run.rounds for run in column.runs), strict=False):
        values = [value for line in lines if (value := of(line)) is not None and math.isfinite(value)]
        if len(values) == len(column.runs):
            found.append((lines[0].round, statistics.fmean(values), _deviation(values)))
    return found


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _slices(column: Column) -> list[Landscape]:
    return [run.landscape for run in column.runs if run.landscape]


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(3, len(labels)), frameon=False, fontsize=9)


def _note(columns: Sequence[Column], what: str) -> str:
    seeds = max(len(column.runs) for column in columns)
    return f"{what}: ± one standard deviation over {seeds} seeds" if seeds > 1 else ""


def _said(figure: Figure, note: str) -> None:
    if note:
        figure.supxlabel(note, fontsize=8, color="0.35")


def by_round(columns: Sequence[Column], shown: Sequence[str], styles: Mapping[str, Style]) -> Figure:
    """What the rounds say of their updates; a band is one standard deviation."""
    wide = min(2, len(shown))
    high = math.ceil(len(shown) / wide)
    figure = blank(1.2 + 3.6 * wide if wide > 1 else 6, 1 + 2.7 * high)
    grid = figure.subplots(high, wide, squeeze=False).ravel()
    for spare in grid[len(shown) :]:
        spare.remove()
    for axes, name in zip(grid, shown, strict=False):
        plain(axes)
        axes.axhline(0, color="0.45", linewidth=0.8, zorder=1)
        axes.set(xlabel="round", ylabel=name)
        whole_numbers(axes)
        for column in columns:
            curve = _curve(column, BY_ROUND[name])
            rounds, means, stds = ([point[i] for point in curve] for i in range(3))
            style = styles[column.name]
            axes.plot(rounds, means, label=as_label(column.name), markevery=max(1, len(rounds) // 8), **style)
            low, high_ = ([m + s * sign for m, s in zip(means, stds, strict=True)] for sign in (-1, 1))
            axes.fill_between(rounds, low, high_, color=style["color"], alpha=0.15, linewidth=0)
    _legend(figure, grid[0])
    _said(figure, _note(columns, "bands"))
    return figure


def _points(axes: Axes, columns: Sequence[Column], of: Sequence[Value], styles: Mapping[str, Style]) -> None:
    """One group of points for each quantity, one point with its bar for each column."""
    for place, column in enumerate(columns):
        shift = 0.7 * (place - (len(columns) - 1) / 2) / max(1, len(columns))
        known = [(i, values) for i, take in enumerate(of) if (values := column.values(take))]
        axes.errorbar(
            [i + shift for i, _ in known],
            [statistics.fmean(values) for _, values in known],
            yerr=[_deviation(values) for _, values in known],
            capsize=2.5,
            elinewidth=1,
            label=as_label(column.name),
            **{**styles[column.name], "linestyle": "none", "markersize": 6},
        )


def noise(columns: Sequence[Column], styles: Mapping[str, Style]) -> Figure:
    """How much of the noise in a product comes of both factors having it, after a step, a round and the run."""
    figure = blank(6.5, 4)
    axes = figure.subplots()
    plain(axes)

    def share(span: str) -> Value:
        return lambda run: share_of_product(run, span)

    _points(axes, columns, [share(span) for span in SPANS], styles)
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_ylim(bottom=-0.001)
    axes.set_xticks(range(len(SPANS)), [f"one {'local step' if span == 'step' else span}" for span in SPANS])
    axes.set(xlabel="noise added over", ylabel="‖N_B N_A‖ / ‖B N_A + N_B A‖")
    _legend(figure, axes)
    return figure


def sharpness(columns: Sequence[Column], styles: Mapping[str, Style]) -> Figure:
    """The largest eigenvalues."""
    figure = blank(6.5, 4)
    axes = figure.subplots()
    plain(axes)
    _points(axes, columns, [lambda run: run.merged.value if run.merged else None, lambda run: run.adapter.value], styles)
    axes.set_xticks([0, 1], ["merged weights", "adapter's tensors"])
    axes.set(ylabel="largest Hessian eigenvalue of the public loss", ylim=(min(0.0, axes.get_ylim()[0]), None), xlim=(-0.6, 1.6))
    _legend(figure, axes)
    _said(figure, _note(columns, "bars"))
    return figure


def line(columns: Sequence[Column], styles: Mapping[str, Style]) -> Figure:
    """The loss along one direction."""
    figure = blank(6.5, 4)
    axes = figure.subplots()
    plain(axes)
    lowest, highest = math.inf, 0.0
    for column in columns:
        slices = _slices(column)
        at = [list(values) for values in zip(*(found.line for found in slices), strict=True)]
        means, stds = [statistics.fmean(values) for values in at], [_deviation(values) for values in at]
        style = styles[column.name]
        axes.plot(slices[0].at, means, label=as_label(column.name), **style)
        low, high = ([m + s * sign for m, s in zip(means, stds, strict=True)] for sign in (-1, 1))
        axes.fill_between(slices[0].at, low, high, color=style["color"], alpha=0.15, linewidth=0)
        lowest, highest = min(lowest, *means), max(highest, *means)
    axes.set(xlabel="distance along a filter-normalised random direction", ylabel="public loss")
    if lowest > 0 and highest > STRETCH * lowest:
        axes.set_yscale("log")
    _legend(figure, axes)
    _said(figure, _note(columns, "bands"))
    return figure


def plane(columns: Sequence[Column]) -> Figure:
    """The loss on a plane, a panel for the first run of each column, on one scale."""
    slices = [_slices(column)[0] for column in columns]
    values = [value for found in slices for row in found.plane for value in row if math.isfinite(value) and value > 0]
    wide = min(3, len(columns))
    high = math.ceil(len(columns) / wide)
    figure = blank(1.4 + 2.8 * wide if wide > 1 else 5, 0.5 + 2.7 * high)
    grid = figure.subplots(high, wide, sharex=True, sharey=True, squeeze=False).ravel()
    for spare in grid[len(columns) :]:
        spare.remove()
    low, top = min(values, default=1.0), max(values, default=2.0)
    top = top if top > low else 2 * low
    look: Style = {"norm": "log", "vmin": low, "vmax": top, "cmap": "cividis", "shading": "gouraud", "rasterized": True}
    for i, (axes, column, found) in enumerate(zip(grid, columns, slices, strict=False)):
        mesh = axes.pcolormesh(found.coarse, found.coarse, found.plane, **look)
        axes.contour(found.coarse, found.coarse, found.plane, levels=8, colors="white", linewidths=0.6, alpha=0.8)
        axes.plot([0], [0], marker="+", color="white", markersize=8)
        axes.set_title(as_label(column.name, 34), fontsize=10)
        axes.set_aspect("equal")
        if i % wide == 0:
            axes.set_ylabel("second direction")
        if i + wide >= len(columns):
            axes.set_xlabel("first direction")
            axes.tick_params(labelbottom=True)
    bar = figure.colorbar(mesh, ax=grid[: len(columns)].tolist(), label="public loss", shrink=0.9, format="%g")
    bar.ax.yaxis.set_minor_formatter("{x:g}")
    return figure
