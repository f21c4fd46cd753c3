"""Who holds what: the records of each virtual site by class."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lalora_flwr.data.data_set import Tensors, data_set
from lalora_flwr.data.partition import site_rows
from lalora_flwr.ground.figures import as_label, blank, colours_of, whole_numbers
from lalora_flwr.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lalora_flwr.data.table_set import TableSet


@dataclass(frozen=True)
class Holdings:
    """A partition in numbers.

    Attributes:
        labels: names of the classes; one empty name where a record has none, or several.
        counts: records of each class, one row per site; (sites, classes).
    """

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    def records(self) -> list[int]:
        """Records of each site."""
        return [sum(row) for row in self.counts]


def holdings(settings: Settings) -> Holdings:
    """Split the data set as a simulation with these settings would.

    Raises:
        ConfigError: if it cannot be read, or not be split this way.
    """
    data = data_set(settings)
    classes = data.classes()
    one_each = settings.data.problem_type == "single-label" and data.labels
    labels = data.labels if one_each else ("",)
    rows = site_rows(classes, settings.data, settings.seed, settings.num_supernodes, data.owners())
    counted = [Counter(int(classes[row]) if one_each else 0 for row in own) for own in rows]
    return Holdings(labels, tuple(tuple(count[c] for c in range(len(labels))) for count in counted))


def class_members(settings: Settings) -> dict[str, int]:
    """How many private records have each class, where a record may have several; empty elsewhere."""
    data = _tables(settings)
    return data.members() if data else {}


def unreadable_images(settings: Settings) -> list[str]:
    """The private images that cannot be read, each with its file and the reason; reads them all."""
    data = _tables(settings)
    return list(data.unreadable_images()) if data else []


def _tables(settings: Settings) -> TableSet | None:
    """The data set, if its records are rows of tables."""
    data = data_set(settings)
    if isinstance(data, Tensors):  # without what reads tables, which is slow to import
        return None
    from lalora_flwr.data.table_set import TableSet

    return data if isinstance(data, TableSet) else None


def holdings_figure(held: Holdings, title: str) -> Figure:
    """One stacked bar per site, coloured by class."""
    sites, classes = len(held.counts), len(held.labels)
    figure = blank(max(6.0, min(16.0, 2 + 0.4 * sites)), 4.5)
    axes = figure.subplots()
    bottom = [0] * sites
    for number, (label, colour) in enumerate(zip(held.labels, colours_of(classes), strict=True)):
        heights = [row[number] for row in held.counts]
        axes.bar(range(sites), heights, bottom=bottom, width=0.85, color=colour, label=as_label(label, 30))
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set(xlabel="site", ylabel="records", title=title, xlim=(-0.6, sites - 0.4), ylim=(0, 1.05 * max(bottom)))
    whole_numbers(axes)
    if 1 < classes <= 20:
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], names[::-1], loc="outside right center", title="class", fontsize="small")
    return figure
