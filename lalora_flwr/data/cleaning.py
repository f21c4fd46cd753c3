"""From a table to rows that a task can use: labels as numbers, and what is missing left out.

A row is judged by itself alone, so leaving it out is the same decision whatever other records there are; how many were
left out goes to the site's own log.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.compute as pc
import torch
from datasets import Dataset, Image, Value
from torch import Tensor

from lalora_flwr.data.columns import Columns
from lalora_flwr.data.labels import indicated, label_texts, values_of
from lalora_flwr.data.limits import LONGEST_PATH
from lalora_flwr.data.tables import in_order
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.tasks.label_text import as_text
from lalora_flwr.tasks.problem import Problem, Target

log = logging.getLogger("lalora_flwr.site")
HIDDEN = (None, "-1")  # what stands for a label in a test set that keeps them back


@dataclass(frozen=True)
class Rows:
    """Usable rows of a table, and the target of each as its problem has it (zeros for language modelling).

    Attributes:
        left_out: how many other rows the table had, by reason.
    """

    table: Dataset
    columns: Columns
    labels: Tensor
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> Rows:
        return Rows(self.table.select(indices), self.columns, self.labels[torch.tensor(list(indices), dtype=torch.long)])


def usable_rows(
    table: Dataset,
    columns: Columns,
    labels: Sequence[str],
    problem: Problem,
    *,
    strict: bool = False,
    folder: Path | None = None,
    left_out: Counter[str] | None = None,
) -> Rows:
    """The rows with all that the task needs.

    Left out: a missing or blank text, second text, response, image or label; a label that holds anything but ``labels``, or is no
    number within the range. The second text of a prompt may be missing. Unreadable images are found later, when they are
    read. Where a column says which virtual site has a record, one without a site is nobody's.

    Args:
        table: the records.
        columns: which column is what.
        labels: the classes, in order; none for numbers.
        problem: what a label is.
        strict: for public records: an unknown label is an error.
        folder: where relative paths of images start.
        left_out: gets how many rows are left out, by reason; otherwise the log does.

    Raises:
        ConfigError: a class with two numbers; an unknown label in public records, or no usable row in them.
    """
    if folder and columns.image and _holds_texts(table, columns.image):
        table = _with_absolute_paths(table, columns.image, folder, inside=left_out is not None)
    number = {as_text(name) or "": i for i, name in enumerate(labels)}
    if len(number) < len(labels):
        raise ConfigError(f"data.labels: a class occurs twice among {', '.join(labels)[:200]}")
    targets: list[Target | None] = [0] * len(table)
    needed = {
        "its text is missing": columns.text,
        "its response is missing": columns.response,
        "its second text is missing": "" if columns.response else columns.text_pair,
        "its site is missing": columns.site,
    }
    there = {why: [_present(v) for v in values_of(table, column)] for why, column in needed.items() if column}
    if columns.label or columns.indicators:
        texts = label_texts(table, columns.label) if columns.label else indicated(table, columns.indicators)
        targets = [None if text is None else problem.target(text, number) for text in texts]
        if strict:
            _check_labels(texts, targets, number, problem)
        there["its label is missing"] = [text is not None for text in texts]
    if columns.image:
        there["its image is missing"] = _image_present(table, columns.image)
    there[problem.unknown] = [target is not None for target in targets]
    reasons = [next((why for why, good in there.items() if not good[i]), "") for i in range(len(table))]
    rows = [i for i, why in enumerate(reasons) if not why]
    others = Counter(filter(None, reasons))
    _say_left_out(left_out, others, len(table))
    if strict and not rows:
        raise ConfigError("data.test: no usable row; see data.label and data.labels")
    selected = table.select(rows) if len(rows) < len(table) else table
    kept = [target for target, why in zip(targets, reasons, strict=True) if not why and target is not None]
    return Rows(selected, columns, problem.stacked(kept, len(labels)), others)


def _check_labels(
    texts: Sequence[str | None], targets: Sequence[Target | None], number: Mapping[str, int], problem: Problem
) -> None:
    """
    Raises:
        ConfigError: labels of public records that are hidden, or are none.
    """
    if all(text in HIDDEN and (text is None or problem.target(text, number) is None) for text in texts):
        raise ConfigError(
            "data.test: its labels are hidden (missing, or -1); take data.test = 'split:validation' or 'hold-out:0.1'"
        )
    odd = [text for text, target in zip(texts, targets, strict=True) if text is not None and target is None]
    if wrong := in_order(set(odd)):
        more = (
            f" ({len(odd)} records have such, among them {', '.join(repr(text[:40]) for text in wrong[:3])})" if odd[1:] else ""
        )
        raise ConfigError(f"data.test: label {wrong[0][:100]!r} is {problem.why(wrong[0], number)}{more}")


def _say_left_out(left_out: Counter[str] | None, found: Counter[str], rows: int) -> None:
    if left_out is not None:
        left_out.update(found)
        return
    for reason, count in found.items():
        log.warning("%d of %d rows left out: %s", count, rows, reason)


def _present(value: object) -> bool:
    return value is not None and value == value and not (isinstance(value, str) and not value.strip())


def _holds_texts(table: Dataset, column: str) -> bool:
    feature = table.features[column]
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")


def _with_absolute_paths(table: Dataset, column: str, folder: Path, *, inside: bool) -> Dataset:
    """``inside``: for a real site's own records, which may name no file of the machine but those beside them."""
    given = values_of(table, column)
    paths = [str(folder / path.strip()) if isinstance(path, str) and _present(path) else None for path in given]
    if inside:
        within = folder.resolve()
        paths = [path if path and _below(path, within) else None for path in paths]
    return table.remove_columns(column).add_column(column, paths, feature=Value("string"))


def _below(path: str, folder: Path) -> bool:
    try:
        return len(path) <= LONGEST_PATH and Path(path).resolve().is_relative_to(folder)
    except (OSError, ValueError, RuntimeError):  # a loop of links, a name with a null
        return False


def _image_present(table: Dataset, column: str) -> list[bool]:
    """Whether a row has an image at all, without reading its bytes."""
    if _holds_texts(table, column):
        return [_present(path) for path in values_of(table, column)]
    images = table.select_columns([column]).with_format("arrow")[:][column]
    absent = pc.is_null(images)
    if isinstance(table.features[column], (Image, dict)):  # bytes, a path, or both
        there = [part for part in ("bytes", "path") if images.type.get_field_index(part) >= 0]
        parts = [pc.is_null(pc.struct_field(images, part)) for part in there]
        absent = pc.or_(absent, functools.reduce(pc.and_, parts))
    return [not value for value in absent.to_pylist()]
