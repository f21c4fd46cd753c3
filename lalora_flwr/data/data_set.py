"""What ``data.name`` and ``data.test`` stand for: private records in a simulation, a site's own, and the public ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lalora_flwr.data import digits
from lalora_flwr.data.records import Records, RecordSet
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.seeds import derive_seed
from lalora_flwr.settings import DataSettings, Settings

if TYPE_CHECKING:
    from datasets import Dataset

    from lalora_flwr.data.cleaning import Rows

Encode = Callable[["Rows"], RecordSet]  # the model's: rows of a table as what it trains on
FIXED_SEED = 2602  # of the draws that must not change with the run's seed: which records are public


@dataclass(frozen=True)
class Facts:
    """The public facts of a data set that a model is built for.

    Attributes:
        task: ``image``, ``text`` or ``language``.
        labels: names of the classes in order (numbers if only their count is declared); empty for language modelling.
        input_shape: shape of one record if the data decide it; None if the model does.
    """

    task: str
    labels: tuple[str, ...]
    input_shape: tuple[int, ...] | None = None


class DataSet(Protocol):
    """Private records to share out, and public ones."""

    labels: tuple[str, ...]

    def classes(self) -> Sequence[int]:
        """The class of each private record."""

    def owners(self) -> Sequence[str] | None:
        """Whose each private record is, if a column says so."""

    def private(self, rows: Sequence[int], encode: Encode) -> RecordSet:
        """Some private records."""

    def public(self, encode: Encode) -> RecordSet:
        """The records that the server evaluates on."""


class Digits:
    """The embedded data set; its records are tensors already."""

    labels = tuple(str(digit) for digit in range(digits.NUM_CLASSES))

    def classes(self) -> Sequence[int]:
        return [int(label) for label in digits.private_part()[1]]

    def owners(self) -> None:
        return None

    def private(self, rows: Sequence[int], encode: Encode) -> RecordSet:
        return Records(*digits.private_part()).take(torch.tensor(list(rows), dtype=torch.long))

    def public(self, encode: Encode) -> RecordSet:
        return Records(*digits.test_part())


class Tables:
    """Records from the hub or from files."""

    def __init__(self, settings: DataSettings, task: str) -> None:
        """
        Raises:
            ConfigError: if there are no records, or their columns cannot be told.
        """
        from lalora_flwr.data.cleaning import label_names, usable_rows
        from lalora_flwr.data.columns import find_columns

        self._settings, self._task = settings, task
        table = _split(settings, settings.split)
        if table is None:
            raise ConfigError(f"data.split = {settings.split!r}: {settings.name} has no such split")
        columns = find_columns(table.features, settings, task, shared=True)
        self.labels = declared_labels(settings) or (label_names(table, columns.label) if columns.label else ())
        declared = settings.num_classes or len(self.labels)
        if columns.label and declared != len(self.labels):
            raise ConfigError(f"data.num-classes = {declared}: {settings.name} has {len(self.labels)} classes")
        rows = usable_rows(table, columns, self.labels, folder=_folder(settings.name))
        if not rows:
            raise ConfigError(f"data.name = {settings.name!r}: no usable record; see data.label and data.labels")
        held_out = settings.test.partition("hold-out:")[2]
        self._held_out: Rows | None = None
        if held_out:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(FIXED_SEED)).tolist()
            count = max(1, round(float(held_out) * len(rows)))
            if count == len(rows):
                raise ConfigError(f"data.test = {settings.test!r}: leaves none of the {count} private records")
            self._held_out, rows = rows.take(sorted(order[:count])), rows.take(sorted(order[count:]))
        self._rows = rows

    def classes(self) -> Sequence[int]:
        return self._rows.labels.tolist()

    def owners(self) -> Sequence[str] | None:
        if not self._rows.columns.site:
            return None
        from lalora_flwr.data.cleaning import label_texts

        return [str(name) for name in label_texts(self._rows.table, self._rows.columns.site)]

    def private(self, rows: Sequence[int], encode: Encode) -> RecordSet:
        return encode(self._rows.take(rows))

    def public(self, encode: Encode) -> RecordSet:
        if self._held_out is not None:
            return encode(_some(self._held_out, self._settings.test_records))
        return _public(self._settings, self._task, self.labels, encode)


class SitesOnly:
    """Private records that only the sites hold; the server knows the public ones and the names of the classes."""

    def __init__(self, settings: DataSettings, task: str) -> None:
        self._settings, self._task = settings, task
        self.labels = declared_labels(settings)

    def classes(self) -> Sequence[int]:
        raise ConfigError("data.name = 'sites': the records lie on real sites; a simulation needs digits, hub: or file:")

    def owners(self) -> None:
        return None

    def private(self, rows: Sequence[int], encode: Encode) -> RecordSet:
        raise ConfigError("data.name = 'sites': the records lie on real sites; a simulation needs digits, hub: or file:")

    def public(self, encode: Encode) -> RecordSet:
        return _public(self._settings, self._task, self.labels, encode)


def data_set(settings: Settings) -> DataSet:
    """The run's data set, read once in a process.

    Raises:
        ConfigError: if it cannot be read or does not fit the task.
    """
    return _data_set(settings.data, settings.task)


@lru_cache(maxsize=2)
def _data_set(settings: DataSettings, task: str) -> DataSet:
    if settings.name == "digits":
        if settings.test not in ("auto", "split:test"):
            raise ConfigError(f"data.test = {settings.test!r}: digits has test records of its own; leave it auto")
        return Digits()
    return SitesOnly(settings, task) if settings.name == "sites" else Tables(settings, task)


def facts(settings: Settings) -> Facts:
    """What the model has to be built for; reads the data only if the settings name or count no classes.

    Raises:
        ConfigError: if the data would have to be read and cannot be.
    """
    if settings.data.name == "digits":
        return Facts("image", Digits.labels, (1, digits.IMAGE_SIZE, digits.IMAGE_SIZE))
    if settings.task == "language":
        return Facts("language", ())
    counted = tuple(str(number) for number in range(settings.data.num_classes))
    return Facts(settings.task, declared_labels(settings.data) or counted or data_set(settings).labels)


def private_records(settings: Settings) -> int:
    """How many records all sites hold together: as declared, else counted.

    Raises:
        ConfigError: if they would have to be counted and cannot be.
    """
    if settings.data.name == "digits":
        return digits.PRIVATE_RECORDS
    if settings.data.name == "sites" and not settings.data.records:
        raise ConfigError("data.records: must say how many records the sites hold together, to price a run without them")
    return settings.data.records or len(data_set(settings).classes())


def declared_labels(settings: DataSettings) -> tuple[str, ...]:
    """The label names that the settings give."""
    return tuple(name.strip() for name in settings.labels.split(",") if name.strip())


@lru_cache(maxsize=4)
def _splits_of_files(key: str, pattern: str) -> Any:
    from lalora_flwr.data.tables import from_files

    return from_files(key, pattern)


def _split(settings: DataSettings, split: str) -> Dataset | None:
    from lalora_flwr.data.tables import from_hub

    kind, _, name = settings.name.partition(":")
    return from_hub(name, split) if kind == "hub" else _splits_of_files("data.name", name).get(split)


def _folder(source: str) -> Path | None:
    """Where relative paths in files start; None for the hub."""
    from lalora_flwr.data.tables import folder_of

    kind, _, name = source.partition(":")
    return folder_of(name) if kind == "file" else None


def _public(settings: DataSettings, task: str, labels: tuple[str, ...], encode: Encode) -> RecordSet:
    from lalora_flwr.data.cleaning import usable_rows
    from lalora_flwr.data.columns import find_columns

    kind, _, name = settings.test.partition(":")
    table: Dataset | None = None
    if kind == "file":
        splits = _splits_of_files("data.test", name)
        split = next((split for split in ("test", "validation") if split in splits), next(iter(splits)))
        table, source = splits[split], settings.test
        wanted = [split]
        private_again = _same_files(settings, name, split, table)
    else:
        source = settings.name
        wanted = [name] if name else [split for split in ("test", "validation") if split != settings.split]
        for split in wanted:
            table = _split(settings, split) if table is None else table
        private_again = settings.split in wanted
    if private_again:
        raise ConfigError(f"data.test = {settings.test!r}: these are the private records; take hold-out:0.1 of them")
    if table is None:
        raise ConfigError(
            f"data.test = {settings.test!r}: {settings.name} has no split for it; name one with split:<name>, files with "
            "file:<path>, or take hold-out:0.1 of the private records"
        )
    columns = find_columns(table.features, settings, task)
    rows = usable_rows(table, columns, labels, strict=True, folder=_folder(source))
    return encode(_some(rows, settings.test_records))


def _same_files(settings: DataSettings, public: str, split: str, table: Dataset) -> bool:
    """Whether test records lie in files of the private ones, whatever the two settings call them."""
    from lalora_flwr.data.tables import files_of

    kind, _, name = settings.name.partition(":")
    own = _splits_of_files("data.name", name).get(settings.split) if kind == "file" else None
    return own is not None and not files_of(public, split, table).isdisjoint(files_of(name, settings.split, own))


def _some(rows: Rows, most: int) -> Rows:
    if not most or most >= len(rows):
        return rows
    generator = torch.Generator().manual_seed(derive_seed(FIXED_SEED, "test-records"))
    return rows.take(sorted(torch.randperm(len(rows), generator=generator)[:most].tolist()))
