"""Parquet of a real site, read value by value, so that no value can do anything to other rows.

A file's schema is its layout and the owner's. A value that is not of its column's type, such as bytes that are not UTF-8, spoils
its own row; a part of a file (a row group) that is broken as a whole is left out whole.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
from datasets import ClassLabel, Features, Image, Value
from datasets.features.features import FeatureType
from pyarrow.parquet import ParquetFile

from lalora_flwr.data.columns import Columns, column_names
from lalora_flwr.data.images import StoredImage
from lalora_flwr.data.labels import class_name, label_text

Cell = str | StoredImage | None  # as it stands in a row: a text, a class name, a path; a picture; None: missing


class Spoilt:
    """A value that cannot be read."""


_SPOILT = Spoilt()


class OpenParquet:
    """A file whose schema could be read."""

    def __init__(self, file: Path) -> None:
        """
        Raises:
            OSError, pyarrow.ArrowException: no Parquet file, or its schema is broken.
        """
        self._file = ParquetFile(file)
        own = Features.from_arrow_schema(self._file.schema_arrow)
        self._own = column_names(list(own))
        self.features = Features({name: own[written] for name, written in self._own.items()})

    def rows(self, columns: Columns, left_out: Counter[str]) -> list[dict[str, Cell]]:
        """The rows as texts, class names and images (a path, or a dict of ``bytes`` and ``path``), by column.

        Args:
            columns: which to read; one that the file lacks is missing in its rows.
            left_out: gets how many rows could not be read, by reason.
        """
        kinds = {columns.label: _class, columns.image: _image}
        kinds |= dict.fromkeys(columns.indicators, _class)
        names = [name for name in (columns.image, *columns.texts) if name]
        there = [name for name in names if name in self.features]
        found: list[dict[str, Cell]] = []
        for group in range(self._file.num_row_groups):
            try:
                table = self._file.read_row_group(group, columns=[self._own[name] for name in there])
            except Exception:  # pyarrow raises many types for broken pages
                left_out["its part of the file is broken"] += self._file.metadata.row_group(group).num_rows
                continue
            read = {
                name: [kinds.get(name, _text)(v, self.features[name]) for v in _values(table[self._own[name]])] for name in there
            }
            for i in range(table.num_rows):
                values = {name: read[name][i] if name in read else None for name in names}
                row = {name: value for name, value in values.items() if not isinstance(value, Spoilt)}
                if len(row) < len(values):
                    left_out["a value in it cannot be read"] += 1
                else:
                    found.append(row)
        return found


def kinds_of(columns: Columns, image: FeatureType | None) -> Features:
    """The types of the columns that `OpenParquet.rows` reads; ``image`` is the type of an image column in its file."""
    kinds: dict[str, FeatureType] = {name: Value("string") for name in columns.texts if name}
    if columns.image:
        kinds[columns.image] = Value("string") if holds_paths(image) else Image()
    return Features(kinds)


def holds_paths(feature: FeatureType | None) -> bool:
    """Whether a column holds texts: of an image column, the paths of its files."""
    return isinstance(feature, Value) and "string" in feature.dtype


def _values(column: pa.ChunkedArray) -> list[object]:
    try:
        return list(column.to_pylist())
    except Exception:  # one value spoils the whole list, so take them one by one
        return [_value(one) for one in column]


def _value(one: pa.Scalar) -> object:
    try:
        value: object = one.as_py()
        return value
    except Exception:  # bytes that are not UTF-8, times out of range, types that Python has not
        return _SPOILT


def _text(value: object, feature: FeatureType) -> Cell | Spoilt:
    if value is None or isinstance(value, str | Spoilt):
        return value
    if isinstance(feature, ClassLabel):
        return class_name(value, feature)
    return None if value != value else str(value)  # NaN


def _class(value: object, feature: FeatureType) -> Cell | Spoilt:
    if isinstance(value, Spoilt):
        return value
    return label_text(value, feature)


def _image(value: object, feature: FeatureType) -> Cell | Spoilt:
    if value is None or isinstance(value, Spoilt) or (isinstance(value, str) and holds_paths(feature)):
        return value
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, dict):
        content, path = value.get("bytes"), value.get("path")
        if content is not None:
            return {"bytes": content, "path": None}  # the path is that of another machine
        return None if path is None else {"bytes": None, "path": path}
    return _SPOILT
