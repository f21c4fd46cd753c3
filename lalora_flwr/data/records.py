"""Labelled records, and what training needs of them: batches, and how to cut a large one into parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from lalora_flwr.data.inputs import Inputs, rows

if TYPE_CHECKING:
    from lalora_flwr.data.cleaning import Rows


class RecordSet(Protocol):
    """Records ready for a model, whatever they are kept as."""

    def __len__(self) -> int:
        """How many records there are."""

    def batch(self, indices: Tensor) -> tuple[Inputs, Tensor]:
        """Inputs and labels of some records, in order; a record that cannot be read is left out."""

    def parts(self, indices: Tensor, most: int) -> list[Tensor]:
        """A batch as parts of at most ``most`` records (0: no limit), each indices; together they are the batch."""


@runtime_checkable
class ReadLate(Protocol):
    """Records that are read when a batch asks for them."""

    def unreadable(self) -> int:
        """How many of those that batches asked for could not be read."""


OBJECT_BYTES = 256  # of a small Python object such as a tensor without its numbers, about
Encode = Callable[["Rows"], RecordSet]  # the model's: rows of a table as what it trains on


def in_parts(indices: Tensor, most: int) -> list[Tensor]:
    """Indices (n,) as parts of at most ``most`` (0: no limit), in order; of none a single empty part."""
    return list(torch.split(indices, most or max(1, len(indices))))


@dataclass(frozen=True)
class Records:
    """Records as tensors: inputs (n, *input_shape), or a dict of such tensors, and labels (n, …)."""

    inputs: Inputs
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Records:
        return Records(rows(self.inputs, indices), self.labels[indices])

    def batch(self, indices: Tensor) -> tuple[Inputs, Tensor]:
        return rows(self.inputs, indices), self.labels[indices]

    def parts(self, indices: Tensor, most: int) -> list[Tensor]:
        return in_parts(indices, most)


def bytes_of(records: object) -> int:
    """The memory of a set of records, its tensors with their Python objects; of one that reads late, what it has before that."""
    if isinstance(records, Tensor):
        return records.numel() * records.element_size() + OBJECT_BYTES
    if isinstance(records, Mapping):
        return sum(map(bytes_of, records.values()))
    if isinstance(records, list | tuple):
        return sum(map(bytes_of, records))
    if is_dataclass(records):
        return OBJECT_BYTES + sum(bytes_of(getattr(records, f.name)) for f in fields(records))
    return OBJECT_BYTES + len(records) if isinstance(records, str) else OBJECT_BYTES


def no_records() -> Records:
    """A set of nothing: every batch of it is empty."""
    return Records(torch.empty(0), torch.empty(0, dtype=torch.long))


@dataclass(frozen=True)
class Subset:
    """Some records of a set."""

    records: RecordSet
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Tensor) -> tuple[Inputs, Tensor]:
        return self.records.batch(self.indices[indices])

    def parts(self, indices: Tensor, most: int) -> list[Tensor]:
        positions = {int(row): position for position, row in enumerate(self.indices)}
        parts = self.records.parts(self.indices[indices], most)
        return [part.clone().apply_(positions.__getitem__) for part in parts]
