"""What ``data.name`` and ``data.test`` stand for: the records of a simulation, and the public ones of any run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch

from lalora_flwr.data.class_names import declared_labels
from lalora_flwr.data.draws import some
from lalora_flwr.data.named import NamedDataSet, named_data_set
from lalora_flwr.data.records import Encode, Records, RecordSet
from lalora_flwr.ground.cache import Cache
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.settings import DataSettings, Settings
from lalora_flwr.tasks import problem_of
from lalora_flwr.tasks.problem import Problem
from lalora_flwr.tasks.single_label import SingleLabel

if TYPE_CHECKING:
    from lalora_flwr.data.stored_tables import StoredTables


@dataclass(frozen=True)
class Facts:
    """The public facts of a data set that a model is built for.

    Attributes:
        task: ``image``, ``text`` or ``language``.
        labels: names of the classes in order (numbers if only their count is declared); empty where there are none.
        input_shape: shape of one record if the data decide it; None if the model does.
        problem: what a label is.
    """

    task: str
    labels: tuple[str, ...]
    input_shape: tuple[int, ...] | None = None
    problem: Problem = field(default_factory=SingleLabel)

    @property
    def outputs(self) -> int:
        """How many outputs the head of a model has for them."""
        return self.problem.outputs(self.labels)


class DataSet(Protocol):
    """Private records to share out, and public ones.

    Attributes:
        labels: names of the classes in order; empty for language modelling.
    """

    labels: tuple[str, ...]

    def classes(self) -> Sequence[float]:
        """By what each private record can be sorted: its class, or its number; 0 where there is neither."""

    def owners(self) -> Sequence[str] | None:
        """Whose each private record is, if that is known."""

    def private(self, rows: Sequence[int], encode: Encode) -> RecordSet:
        """Some private records, by their places from 0 on."""

    def public(self, encode: Encode) -> RecordSet:
        """The records that the server evaluates on."""

    def public_left_out(self) -> Mapping[str, int]:
        """How many rows for them `public` left out when it was last called, by reason; none of those that it draws from."""


class Tensors:
    """A data set with a name whose records are tensors already; the private ones are read once."""

    def __init__(self, named: NamedDataSet, settings: DataSettings) -> None:
        self._named, self._settings, self.labels = named, settings, named.labels
        self._problem = problem_of(settings)

    @cached_property
    def _private(self) -> Records:
        records = self._checked(self._named.private())
        _check_count(self._named, self._settings, len(records))
        return records

    def _checked(self, records: object) -> Records:
        """
        Raises:
            ConfigError: these are no records as the data set declares them.
        """
        shape, name = self._named.input_shape, self._settings.name
        if not (isinstance(records, Records) and isinstance(records.inputs, torch.Tensor)):
            raise ConfigError(f"data.name = {name!r}: declares an input_shape, and gives no tensors")
        if records.inputs.shape[1:] != shape or len(records.inputs) != len(records) or not len(records):
            raise ConfigError(f"data.name = {name!r}: gives tensors {tuple(records.inputs.shape)}; must be (records, *{shape})")
        if wrong := self._problem.refusal(records.labels, len(self.labels)):
            raise ConfigError(f"data.name = {name!r}: {wrong}")
        return records

    def classes(self) -> Sequence[float]:
        return self._problem.groups(self._private.labels)

    def owners(self) -> Sequence[str] | None:
        return None if self._named.owners is None else self._named.owners()

    def private(self, rows: Sequence[int], encode: Encode) -> RecordSet:
        return self._private.take(torch.tensor(list(rows), dtype=torch.long))

    def public(self, encode: Encode) -> RecordSet:
        records = self._checked(self._named.public())
        return records.take(torch.tensor(some(len(records), self._settings.test_records)))

    def public_left_out(self) -> Mapping[str, int]:
        return {}


class DataSets:
    """The data sets that were read last.

    They are known by the settings, by the data set that has the name, and by the stamps of the files that the settings name: a
    file that was written since is read again. (A class folder of images is known by the names in it: its images are looked at
    when they are needed. A data set of the hub is taken not to change while a process runs.)
    """

    def __init__(self, size: int = 2, stored: Callable[[DataSettings], StoredTables] | None = None) -> None:
        """
        Args:
            size: how many data sets are kept.
            stored: opens the tables of ``hub:…`` and ``file:…``; None: from the disk and the hub.
        """
        self._kept: Cache[Hashable, DataSet] = Cache(size)
        self._stored = stored

    def __call__(self, settings: Settings) -> DataSet:
        """The run's data set.

        Raises:
            ConfigError: if it cannot be read or does not fit the task.
        """
        data, task = settings.data, settings.task
        named = named_data_set(data.name)
        if named is not None:
            named.check(settings)
        return self._kept.get((data, task, named, _stamps(data)), lambda: self._read(data, task, named))

    def _read(self, settings: DataSettings, task: str, named: NamedDataSet | None) -> DataSet:
        if named is not None and named.input_shape is not None:
            return Tensors(named, settings)
        from lalora_flwr.data.stored_tables import StoredTables  # with `datasets`, which tensors do not need
        from lalora_flwr.data.table_set import NamedTables, SitesOnly, TableSet

        if named is not None:
            table = TableSet(settings, task, NamedTables(named))
            _check_count(named, settings, len(table.classes()))
            return table
        stored = (self._stored or StoredTables)(settings)
        return SitesOnly(settings, task, stored) if settings.name == "sites" else TableSet(settings, task, stored)


def _check_count(named: NamedDataSet, settings: DataSettings, count: int) -> None:
    if count != named.records:  # the run was priced with them
        raise ConfigError(f"data.name = {settings.name!r}: has {count} usable private records, and declares {named.records}")


def _stamps(settings: DataSettings) -> Hashable:
    patterns = [value.partition(":")[2] for value in (settings.name, settings.test) if value.startswith("file:")]
    if not patterns:
        return ()
    from lalora_flwr.data.tables import stamp_of_files

    return tuple(stamp_of_files(pattern) for pattern in patterns)


data_set = DataSets()  # of this process; whoever wants others makes them and hands them on


def facts(settings: Settings, read: Callable[[Settings], DataSet] = data_set) -> Facts:
    """What the model has to be built for; reads the data only if the settings name or count no classes.

    Raises:
        ConfigError: if the data would have to be read and cannot be.
    """
    if named := named_data_set(settings.data.name):
        return Facts(named.task, named.labels, named.input_shape, problem_of(settings.data))
    problem = problem_of(settings.data)
    if settings.task == "language" or not problem.named:
        return Facts(settings.task, (), problem=problem)
    counted = tuple(str(number) for number in range(settings.data.num_classes))
    return Facts(settings.task, declared_labels(settings.data) or counted or read(settings).labels, problem=problem)


def private_records(settings: Settings, read: Callable[[Settings], DataSet] = data_set) -> int:
    """How many records all sites hold together: as declared, else counted.

    Raises:
        ConfigError: if they would have to be counted and cannot be.
    """
    if named := named_data_set(settings.data.name):
        return named.records
    if settings.data.name == "sites" and not settings.data.records:
        raise ConfigError("data.records: must say how many records the sites hold together, to price a run without them")
    return settings.data.records or len(read(settings).classes())
