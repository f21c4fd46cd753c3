"""From a table to rows that a task can use: labels as numbers, and what is missing left out.

A row is judged by itself alone, so leaving it out is the same decision whatever other records there are; how many were
left out goes to the site's own log.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from torch import Tensor

from lalora_flwr.data.columns import Columns
from lalora_flwr.errors import ConfigError

log = logging.getLogger("lalora_flwr.site")


@dataclass(frozen=True)
class Rows:
    """Usable rows of a table, and the class of each (zeros for language modelling)."""

    table: Dataset
    columns: Columns
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> Rows:
        return Rows(self.table.select(indices), self.columns, self.labels[torch.tensor(list(indices), dtype=torch.long)])


def label_texts(table: Dataset, column: str) -> list[str | None]:
    """Each row's label by name; None where it is missing."""
    feature = table.features[column]
    values = table.data.column(column).to_pylist()
    if isinstance(feature, ClassLabel):
        return [None if v is None or v < 0 else feature.names[v] for v in values]
    return [_as_text(v) for v in values]


def _as_text(value: Any) -> str | None:
    if value is None or value != value:  # NaN
        return None
    if isinstance(value, float) and value.is_integer():  # a column of whole numbers with gaps is read as floats
        value = int(value)
    return str(value).strip() or None


def label_names(table: Dataset, column: str) -> tuple[str, ...]:
    """The label names of a table: those of its type, else all that occur, numbers by value and words by letter."""
    feature = table.features[column]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    found = {name for name in label_texts(table, column) if name is not None}
    numbers = all(name.lstrip("-").isdigit() for name in found)
    return tuple(sorted(found, key=int if numbers else str))


def usable_rows(table: Dataset, columns: Columns, labels: Sequence[str], *, strict: bool = False) -> Rows:
    """The rows with all that the task needs.

    Left out: a missing or blank text, second text, response, image or label, and a label that is not among ``labels``. The
    second text of a prompt may be missing. Unreadable images are found later, when they are read.

    Args:
        table: the records.
        columns: which column is what.
        labels: the classes, in order.
        strict: for public records: an unknown label is an error.

    Raises:
        ConfigError: an unknown label in public records, or no usable row in them.
    """
    number = {name: i for i, name in enumerate(labels)}
    keep = [True] * len(table)
    classes = [0] * len(table)
    if columns.label:
        texts = label_texts(table, columns.label)
        if strict and (unknown := sorted({t for t in texts if t is not None and t not in number})):
            raise ConfigError(f"data.test: label {unknown[0]!r} is not among {', '.join(labels)[:200]}; see data.labels")
        classes = [number.get(text or "", -1) if text is not None else -1 for text in texts]
        keep = [c >= 0 for c in classes]
    needed = [columns.image, columns.text, columns.response, "" if columns.response else columns.text_pair]
    for column in filter(None, needed):
        values = table.data.column(column).to_pylist() if column != columns.image else _image_present(table, column)
        keep = [k and _present(v) for k, v in zip(keep, values, strict=True)]
    rows = [i for i, k in enumerate(keep) if k]
    if len(rows) < len(table):
        log.warning("%d of %d rows left out: a value is missing or the label is unknown", len(table) - len(rows), len(table))
    if strict and not rows:
        raise ConfigError("data.test: no usable row; see data.label and data.labels")
    selected = table.select(rows) if len(rows) < len(table) else table
    return Rows(selected, columns, torch.tensor([classes[i] for i in rows], dtype=torch.long))


def _present(value: Any) -> bool:
    return value is not None and not (isinstance(value, str) and not value.strip())


def _image_present(table: Dataset, column: str) -> list[bool | None]:
    """Whether a row has an image at all, without reading its bytes."""
    return [None if absent else True for absent in table.data.column(column).is_null().to_pylist()]
