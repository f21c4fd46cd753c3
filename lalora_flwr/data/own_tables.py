"""The table under a real site's own ``data-path``: which rows there are, and which column is what.

Files that are missing or of the wrong kind, a split or a column that is missing are faults of the layout, and are refused. A file
that cannot be read holds no rows.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from datasets import Dataset, Features, Image, Value
from datasets.features.features import FeatureType

from lalora_flwr.data.class_names import declared_labels
from lalora_flwr.data.columns import Columns, find_columns
from lalora_flwr.data.image_folder import class_folders, images_in
from lalora_flwr.data.own_lines import SPLITTERS, TOO_LONG, read_lines
from lalora_flwr.data.own_parquet import Cell, OpenParquet, holds_paths, kinds_of
from lalora_flwr.data.readers import READERS
from lalora_flwr.data.tables import PARQUET, split_named, table_files
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.files import expanded
from lalora_flwr.ground.words import is_text, one_form
from lalora_flwr.settings import DataSettings, Settings

log = logging.getLogger("lalora_flwr.site")
KEY = "data-path"
OwnTable = tuple[Dataset, Columns]
T = TypeVar("T")


def own_table(settings: Settings, path: str, left_out: Counter[str], broken_files: list[str], longest: int) -> OwnTable | None:
    """All rows, and which column is what; None if no file could be read, so that there are no columns either.

    Args:
        settings: with the owner's data settings.
        path: the owner's ``data-path``.
        left_out: gets how many rows could not be read, by reason.
        broken_files: gets the names of files that could not be read at all.
        longest: bytes; a line or a value of as many or more is no record.

    Raises:
        ConfigError: the files do not exist, may not be opened, or lack the split or a column; one line for the owner.
    """
    try:
        splits = table_files(expanded(path))
        files = [Path(file) for file in _of_split(splits, settings.data)] if splits else []
        for file in files:
            file.open("rb").close()
        if not splits:
            return _images(settings, path, left_out)
    except OSError as error:
        raise ConfigError(f"{KEY} = {path!r}: may not be opened: {error.strerror}") from None
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) > 1:
        raise ConfigError(f"{KEY} = {path!r}: {', '.join(sorted(kinds))} files; must be of one kind")
    read = _parquet if kinds == {PARQUET} else _lines
    return read(settings, path, files, left_out, broken_files, longest)


def _of_split(splits: Mapping[str, T], settings: DataSettings) -> T:
    if settings.split not in splits:
        raise ConfigError(f"split = {settings.split!r}: not among {', '.join(splits)} under data-path")
    return splits[settings.split]


def _columns(features: Features, settings: Settings) -> Columns:
    return find_columns(features, settings.data, settings.task, key="{}-column")


def _images(settings: Settings, path: str, left_out: Counter[str]) -> OwnTable:
    """Of a folder with one sub-folder per class; what is read here are names only."""
    folder = expanded(path)
    if not folder.is_dir():
        raise ConfigError(f"{KEY} = {path!r}: no such file or folder")
    places = class_folders(folder, split_named)
    if not places:
        raise ConfigError(f"{KEY} = {path!r}: cannot be read: no table and no sub-folder of images per class")
    found = [(str(image), kind.name) for kind in _of_split(places, settings.data) for image in images_in(kind)]
    found, all_found = [pair for pair in found if all(map(is_text, pair))], len(found)
    if len(found) < all_found:
        left_out["the name of its file is not UTF-8"] += all_found - len(found)
    features = Features({"image": Image(), "label": Value("string")})
    columns = {"image": [image for image, _ in found], "label": [name for _, name in found]}
    return Dataset.from_dict(columns, features), _columns(features, settings)


def _lines(
    settings: Settings, path: str, files: Sequence[Path], left_out: Counter[str], broken_files: list[str], longest: int
) -> OwnTable | None:
    if not {file.suffix.lower() for file in files} <= set(READERS):
        kind = files[0].suffix or "nameless"
        raise ConfigError(f"{KEY} = {path!r}: {kind} files; must be of one kind of {', '.join(READERS)}, .parquet")
    named = [] if files[0].suffix.lower() in SPLITTERS else _named(settings)
    read = []
    for file in files:
        try:
            read.append(read_lines(file, named, longest))
        except (OSError, ValueError) as error:
            log.error("data-path: %s: %s", file.name, error)
            broken_files.append(file.name)
    names = list(dict.fromkeys(itertools.chain.from_iterable(lines.names for lines in read)))
    if not names:
        return None
    values: dict[str, list[str | None]] = {name: [] for name in names}
    for lines in read:
        left_out.update(lines.left_out)
        place = {name: i for i, name in enumerate(lines.names)}
        for name, column in values.items():
            column += [row[place[name]] if name in place else None for row in lines.rows]
    features = Features({name: Value("string") for name in names})
    return Dataset.from_dict(values, features), _columns(features, settings)


def _named(settings: Settings) -> list[str]:
    """The columns that the owner names for JSON lines.

    They have no header: which names there are depends on the records, and choosing among them would let one record decide
    what all the others are.

    Raises:
        ConfigError: if one is not named.
    """
    data = settings.data
    needed = {
        "image": {"image-column": data.image, "label-column": data.label},
        "text": {"text-column": data.text, "label-column": data.label},
        "language": {"text-column": data.text, "response-column": data.response},
    }[settings.task]
    indicators = () if data.label or data.problem_type != "multi-label" else declared_labels(data)
    if indicators:
        del needed["label-column"]
    for key, name in needed.items():
        if not name:
            raise ConfigError(f"{key}: must be named for JSON lines, which have no header that all records share")
    pair = [] if data.text_pair in ("", "none") or settings.task == "image" else [data.text_pair]
    return list(dict.fromkeys(map(one_form, [*needed.values(), *pair, *indicators])))


def _parquet(
    settings: Settings, path: str, files: Sequence[Path], left_out: Counter[str], broken_files: list[str], longest: int
) -> OwnTable | None:
    opened: list[OpenParquet] = []
    kinds: dict[str, FeatureType] = {}  # the type of a column is that of the first file with it
    for file in files:
        try:
            opened.append(OpenParquet(file))
        except Exception as error:  # pyarrow and datasets raise many types for a broken schema
            log.error("data-path: %s: %s", file.name, error)
            broken_files.append(file.name)
    for one in opened:
        for name, kind in one.features.items():
            kinds.setdefault(name, kind)
    if not kinds:
        return None
    columns = _columns(Features(kinds), settings)
    image = kinds.get(columns.image)
    if any(columns.image in one.features and holds_paths(one.features[columns.image]) != holds_paths(image) for one in opened):
        raise ConfigError(f"{KEY} = {path!r}: the files differ in what column {columns.image!r} holds: paths or images")
    rows = []
    for row in itertools.chain.from_iterable(one.rows(columns, left_out) for one in opened):
        if isinstance(picture := row.get(columns.image), dict):  # a path in it could name any file of the machine
            row = {**row, columns.image: None if picture["bytes"] is None else {"bytes": picture["bytes"], "path": None}}
        if any(_size(value) >= longest for value in row.values()):
            left_out[TOO_LONG] += 1
        else:
            rows.append(row)
    features = kinds_of(columns, image)
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features), columns


def _size(value: Cell) -> int:
    """Of a text or bytes, alone or in an image: columns hold 2 GiB, and one value beyond would take all of them with it."""
    content = value["bytes"] if isinstance(value, dict) else value
    return len(content) if isinstance(content, str | bytes) else 0  # a field named bytes may hold anything
