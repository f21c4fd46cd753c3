"""A data set whose records are rows of tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from datasets import Dataset

from lalora_flwr.data.class_names import declared_labels
from lalora_flwr.data.cleaning import Rows, usable_rows
from lalora_flwr.data.columns import column_names, find_columns
from lalora_flwr.data.draws import held_out, some
from lalora_flwr.data.images import unreadable
from lalora_flwr.data.labels import check_classes, label_names, label_texts
from lalora_flwr.data.named import NamedDataSet
from lalora_flwr.data.records import Encode, Records, RecordSet
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.settings import DataSettings
from lalora_flwr.tasks import problem_of


class TableSource(Protocol):
    """Where the tables come from.

    Attributes:
        labels: names of the classes, if the source has its own.
        folder: where relative paths in the private table start; None if it holds none.
    """

    labels: tuple[str, ...]
    folder: Path | None

    def private(self) -> Dataset:
        """The table that the sites share."""

    def public(self) -> tuple[Dataset, Path | None]:
        """The table that the server evaluates on, and where relative paths in it start."""


class NamedTables:
    """The tables of a data set with a name."""

    folder: Path | None = None

    def __init__(self, named: NamedDataSet) -> None:
        self._named, self.labels = named, named.labels

    def private(self) -> Dataset:
        return _table(self._named.private())

    def public(self) -> tuple[Dataset, Path | None]:
        return _table(self._named.public()), None


def _table(records: Records | Dataset) -> Dataset:
    if isinstance(records, Records):
        raise ConfigError("data.name: the data set gives tensors and no input_shape for them")
    return records


class TableSet:
    """Records from the hub, from files, or from a table of a data set with a name."""

    def __init__(self, settings: DataSettings, task: str, source: TableSource) -> None:
        """
        Raises:
            ConfigError: if there are no records, or their columns cannot be determined.
        """
        self._settings, self._task, self._source, self._problem = settings, task, source, problem_of(settings)
        table = _in_one_form(source.private())
        columns = find_columns(table.features, settings, task, shared=True)
        named = self._problem.named and bool(columns.label or columns.indicators)
        self.labels = source.labels or declared_labels(settings)
        if named and not self.labels:
            self.labels = label_names(table, columns.label, self._problem)
        if named:
            check_classes(self.labels, self._problem)
        declared = settings.num_classes or len(self.labels)
        if named and declared != len(self.labels):
            raise ConfigError(f"data.num-classes = {declared}: {settings.name} has {len(self.labels)} classes")
        rows = usable_rows(table, columns, self.labels, self._problem, folder=source.folder)
        if not rows:
            raise ConfigError(f"data.name = {settings.name!r}: no usable record; see data.label and data.labels")
        share = settings.test.partition("hold-out:")[2]
        self._held_out: Rows | None = None
        self._left_out: Mapping[str, int] = {}
        if share:
            public, private = held_out(len(rows), float(share))
            if not private:
                raise ConfigError(f"data.test = {settings.test!r}: leaves none of the {len(public)} private records")
            self._held_out, rows = rows.take(public), rows.take(private)
        self._rows = rows

    def classes(self) -> Sequence[float]:
        return self._problem.groups(self._rows.labels)

    def members(self) -> dict[str, int]:
        """How many private records have each class, where a record may have several; empty elsewhere."""
        if self._problem.name != "multi-label":
            return {}
        return dict(zip(self.labels, self._problem.counts(self._rows.labels, len(self.labels)), strict=True))

    def unreadable_images(self) -> Iterator[str]:
        """The private images that cannot be read, each with its file and the reason; reads them all."""
        if self._rows.columns.image:
            yield from unreadable(self._rows.table, self._rows.columns.image)

    def owners(self) -> Sequence[str] | None:
        if not self._rows.columns.site:
            return None
        return [str(name) for name in label_texts(self._rows.table, self._rows.columns.site)]

    def private(self, rows: Sequence[int], encode: Encode) -> RecordSet:
        return encode(self._rows.take(rows))

    def public(self, encode: Encode) -> RecordSet:
        if self._held_out is not None:
            return encode(_some(self._held_out, self._settings.test_records))
        rows = _public(self._settings, self._task, self.labels, self._source)
        self._left_out = rows.left_out
        return encode(_some(rows, self._settings.test_records))

    def public_left_out(self) -> Mapping[str, int]:
        return self._left_out


class SitesOnly:
    """Private records that only the sites hold; the server knows the public ones and the names of the classes."""

    def __init__(self, settings: DataSettings, task: str, source: TableSource) -> None:
        self._settings, self._task, self._source = settings, task, source
        self.labels = declared_labels(settings)
        self._left_out: Mapping[str, int] = {}

    def classes(self) -> Sequence[float]:
        raise ConfigError(NOT_HERE)

    def owners(self) -> None:
        return None

    def private(self, rows: Sequence[int], encode: Encode) -> RecordSet:
        raise ConfigError(NOT_HERE)

    def public(self, encode: Encode) -> RecordSet:
        rows = _public(self._settings, self._task, self.labels, self._source)
        self._left_out = rows.left_out
        return encode(_some(rows, self._settings.test_records))

    def public_left_out(self) -> Mapping[str, int]:
        return self._left_out


NOT_HERE = "data.name = 'sites': the records lie on real sites; a simulation needs a named data set, hub: or file:"


def _public(settings: DataSettings, task: str, labels: tuple[str, ...], source: TableSource) -> Rows:
    """The rows that the server evaluates on.

    Raises:
        ConfigError: they cannot be read, or one has a label that is not among ``labels``.
    """
    table, folder = source.public()
    table = _in_one_form(table)
    columns = find_columns(table.features, settings, task)
    return usable_rows(table, columns, labels, problem_of(settings), strict=True, folder=folder)


def _in_one_form(table: Dataset) -> Dataset:
    """The table with the names of its columns in one Unicode form, which no image or text has to be read for."""
    others = {written: name for name, written in column_names(table.column_names).items() if written != name}
    return table.rename_columns(others) if others else table


def _some(rows: Rows, most: int) -> Rows:
    places = some(len(rows), most)
    return rows if len(places) == len(rows) else rows.take(places)
