"""The label of a row as the name of a class, and which classes there are."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from datasets import ClassLabel, Dataset

from lalora_flwr.data.tables import in_order
from lalora_flwr.ground.errors import ConfigError

FEW_RECORDS = 20  # in a table of no more, each may have a class of its own
FRACTION = re.compile(r"[+-]?([0-9]+\.[0-9]*[1-9][0-9]*|\.[0-9]+|[0-9.]+[eE][+-]?[0-9]+)")


def as_text(value: object) -> str | None:
    """A label as it is compared; None if it is missing.

    Equal are the Unicode forms of one text (NFC), ``TRUE`` and ``true``, and a whole number with and without ``.0``, as files
    with gaps write it.
    """
    if value is None or value != value:  # NaN
        return None
    if isinstance(value, bool):
        return str(value).lower()  # as JSON has it
    text = unicodedata.normalize("NFC", str(value)).strip()
    if text.lower() in ("true", "false"):
        return text.lower()
    if re.fullmatch(r"[+-]?[0-9]+\.0+", text):
        text = text.partition(".")[0]
    return text or None


def label_texts(table: Dataset, column: str) -> list[str | None]:
    """Each row's label by name; None where it is missing."""
    feature = table.features[column]
    values = values_of(table, column)
    if isinstance(feature, ClassLabel):
        return [class_name(v, feature) for v in values]
    return [as_text(v) for v in values]


def class_name(value: object, feature: ClassLabel) -> str | None:
    """The name of a class by its number in a typed column; None if it is missing."""
    if not isinstance(value, int) or value < 0:
        return None
    return as_text(feature.names[value]) if value < len(feature.names) else str(value)


def values_of(table: Dataset, column: str) -> list[object]:
    """A column's values."""
    return list(table.select_columns([column])[:][column])


def label_names(table: Dataset, column: str) -> tuple[str, ...]:
    """The label names of a table: those of its type, else all that occur, numbers by value and words by letter.

    Raises:
        ConfigError: what occurs are no classes: numbers with fractions, lists, or a value for nearly every record.
    """
    feature = table.features[column]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    counts = Counter(name for name in label_texts(table, column) if name is not None)
    if wrong := _no_classes(counts):
        raise ConfigError(f"data.label: column {column!r} holds {wrong}; name another column, or the classes in data.labels")
    return in_order(counts)


def _no_classes(counts: Counter[str]) -> str:
    """Why these values, with how many rows have each, are no classes; empty if they can be."""
    for name in counts:
        if FRACTION.fullmatch(name):
            return f"numbers such as {name}, which are no classes"
        if name[0] in "[{" and _is_collection(name):
            return f"lists such as {name[:40]}; classes of tokens, or several of one record, are not supported"
    if counts.total() > FEW_RECORDS and len(counts) > 0.5 * counts.total():
        return f"{len(counts)} values in {counts.total()} records, so that they are ids or texts"
    return ""


def _is_collection(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list | dict)
    except ValueError:
        return False


def refuse_one_class(labels: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: there is nothing to tell apart.
    """
    if len(labels) == 1:
        raise ConfigError(f"data.label: all records are of the class {labels[0]!r}; there must be two at least")
