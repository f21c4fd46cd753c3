"""The label of a row as the name of a class, and which classes there are."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence

from datasets import ClassLabel, Dataset
from datasets.features.features import FeatureType

from lalora_flwr.data.tables import in_order
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.words import is_text
from lalora_flwr.tasks.label_text import as_text
from lalora_flwr.tasks.problem import Problem

FEW_RECORDS = 20  # in a table of no more, each may have a class of its own
FRACTION = re.compile(r"[+-]?([0-9]+\.[0-9]*[1-9][0-9]*|\.[0-9]+|[0-9.]+[eE][+-]?[0-9]+)")


def label_texts(table: Dataset, column: str) -> list[str | None]:
    """Each row's label by name, several as a list in JSON; None where it is missing."""
    feature = table.features[column]
    return [label_text(value, feature) for value in values_of(table, column)]


def label_text(value: object, feature: FeatureType) -> str | None:
    """A label of a column of this type by name, several as a list in JSON; None if it is missing."""
    if isinstance(feature, ClassLabel):
        return class_name(value, feature)
    if isinstance(value, list):
        inner = getattr(feature, "feature", None)
        return json.dumps([label_text(one, inner) for one in value], ensure_ascii=False)
    return as_text(value)


def indicated(table: Dataset, columns: Sequence[str]) -> list[str | None]:
    """Each row's classes as a list in JSON, from one column of 0 and 1 (or false and true) per class.

    None where a value is missing. A value that is neither 0 nor 1 stands in the list instead of its class, and makes it none.
    """
    values = zip(*(label_texts(table, column) for column in columns), strict=True)
    return [_indicated(row, columns) for row in values]


def _indicated(row: Sequence[str | None], columns: Sequence[str]) -> str | None:
    if any(value is None for value in row):
        return None
    if odd := [value for value in row if value not in ("0", "1", "false", "true")]:
        return json.dumps([f"{odd[0]} in place of 0 or 1"], ensure_ascii=False)
    return json.dumps([name for name, value in zip(columns, row, strict=True) if value in ("1", "true")], ensure_ascii=False)


def class_name(value: object, feature: ClassLabel) -> str | None:
    """The name of a class by its number in a typed column; None if it is missing."""
    if not isinstance(value, int) or value < 0:
        return None
    return as_text(feature.names[value]) if value < len(feature.names) else str(value)


def values_of(table: Dataset, column: str) -> list[object]:
    """A column's values."""
    return list(table.select_columns([column])[:][column])


def label_names(table: Dataset, column: str, problem: Problem) -> tuple[str, ...]:
    """The label names of a table: those of its type, else all that occur, numbers by value and words by letter.

    Raises:
        ConfigError: what occurs are no classes: numbers with fractions, lists, or a value for nearly every record; or what
            separates several classes differs from record to record.
    """
    feature = table.features[column]
    texts = [text for text in label_texts(table, column) if text is not None]
    try:
        fields = problem.occurring(texts)
    except ValueError as fault:
        raise ConfigError(f"data.label: column {column!r} holds {fault}; name the classes in data.labels") from None
    if any(len(set(names)) < len(names) for names in fields):
        raise ConfigError(
            f"data.label: column {column!r} holds a class twice in one record, as where each token has one (classes of tokens "
            "are not supported) or each class its 0 or 1 (make that one column per class, named in data.labels)"
        )
    inner = getattr(feature, "feature", feature)
    if isinstance(inner, ClassLabel):
        return tuple(inner.names)
    counts = Counter(name for names in fields for name in names)
    if wrong := _no_classes(counts, problem):
        raise ConfigError(f"data.label: column {column!r} holds {wrong}; name another column, or the classes in data.labels")
    return in_order(counts)


def _no_classes(counts: Counter[str], problem: Problem) -> str:
    """Why these values, with how many rows have each, are no classes; empty if they can be."""
    for name in counts:
        if FRACTION.fullmatch(name):
            return f"numbers such as {name}, which are no classes (data.problem-type = 'regression' learns numbers)"
        if not name:
            return "an empty name among several, or one that is missing"
        if name[0] in "[{" and (problem.name == "multi-label" or _is_collection(name)):
            several = "data.problem-type = 'multi-label' takes several classes; those of tokens are not supported"
            if problem.name == "multi-label":
                several = "write lists as JSON, or separate the classes by |"
            return f"lists such as {name[:40]} ({several})"
    if counts.total() > FEW_RECORDS and len(counts) > 0.5 * counts.total():
        return f"{len(counts)} values in {counts.total()} records, so that they are ids or texts"
    return ""


def _is_collection(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list | dict)
    except (ValueError, RecursionError):
        return False


def check_classes(labels: Sequence[str], problem: Problem) -> None:
    """
    Raises:
        ConfigError: there is nothing to tell apart, or a class has a name that a saved model cannot hold.
    """
    if odd := [name for name in labels if not is_text(name)]:
        raise ConfigError(f"data.label: the class {odd[0]!r} holds half a character, which no file can; rename it")
    if problem.name == "single-label" and len(labels) == 1:
        raise ConfigError(f"data.label: all records are of the class {labels[0]!r}; there must be two at least")
