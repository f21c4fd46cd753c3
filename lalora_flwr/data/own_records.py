"""A real site's own records: what its node-config names, read so that the site can answer whatever state they are in.

Two kinds of faults are told apart. The layout is the owner's: that the files are there and may be opened, their kinds, splits and
columns. If it is wrong the site refuses, and `lalora site check` says why beforehand. A row or an image that is of no use
is left out by itself, counted, and changes nothing about the others; a file that cannot be read holds no records.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lalora_flwr.data.data_set import Encode, declared_labels
from lalora_flwr.data.records import RecordSet, no_records
from lalora_flwr.data.texts import TextRecords
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.settings import DataSettings, Settings

if TYPE_CHECKING:
    from datasets import Dataset

    from lalora_flwr.data.cleaning import Rows
    from lalora_flwr.data.columns import Columns

log = logging.getLogger("lalora_flwr.site")
KEY = "data-path"


@dataclass
class OwnRecords:
    """A site's records, and for its owner's eyes what was found.

    Attributes:
        records: ready for the model.
        found: rows and images, usable or not.
        left_out: how many of them are of no use, by reason.
        per_class: usable records of each class, in order; empty for language modelling.
        broken_files: names of files that could not be read at all.
        columns: which column is what; None if no file could be read.
        unknown_labels: labels that are no class, with how many records have them.
    """

    records: RecordSet = field(default_factory=no_records)
    found: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    per_class: tuple[int, ...] = ()
    broken_files: list[str] = field(default_factory=list)
    columns: Columns | None = None
    unknown_labels: Counter[str] = field(default_factory=Counter)

    def say(self) -> None:
        """Say what was left out, in the site's own log."""
        for name in self.broken_files:
            log.error("data-path: %s cannot be read: none of its records are used", name)
        for reason, count in self.left_out.items():
            log.warning("data-path: %d of %d records left out: %s", count, self.found, reason)


def own_records(settings: Settings, path: str, encode: Encode, vocabulary: int = 0, segments: int = 0) -> OwnRecords:
    """A real site's records, from the files under its own ``data-path``; no copy of them is left on disk.

    Guarantee: every row or image is judged by itself alone, so one more or less changes nothing about the others; whether this
    raises depends on the layout of the files only.

    Args:
        settings: with the owner's data settings (`lalora_flwr.data.pins.pinned`).
        path: the owner's ``data-path``.
        encode: the model's.
        vocabulary: how many token ids the model knows; 0: it takes no tokens.
        segments: how many types of tokens it knows; 0: it has none.

    Raises:
        ConfigError: the files do not exist, may not be opened, or lack the split or a column; one line for the owner.
    """
    from lalora_flwr.data.cleaning import as_text, label_texts, usable_rows
    from lalora_flwr.data.tables import folder_of

    labels = declared_labels(settings.data)
    if not labels and settings.task != "language":
        raise ConfigError("labels: must name the classes, in the same order for every site")
    own = OwnRecords(per_class=(0,) * len(labels))
    table, columns = _table(settings, path, own)
    if table is None or columns is None:
        own.say()
        return own
    own.found, own.columns = len(table) + own.left_out.total(), columns
    if labels:
        classes = {as_text(name) for name in labels}
        own.unknown_labels.update(t for t in label_texts(table, columns.label) if t is not None and t not in classes)
    rows = usable_rows(table, columns, labels, folder=folder_of(path), left_out=own.left_out)
    own.records, rows = _encoded(rows, encode, vocabulary, segments, own.left_out)
    if labels:
        own.per_class = tuple(torch.bincount(rows.labels, minlength=len(labels)).tolist())
    own.say()
    return own


def _table(settings: Settings, path: str, own: OwnRecords) -> tuple[Dataset | None, Columns | None]:
    """All rows, and which column is what; None if no file could be read, so that there are no columns either."""
    from lalora_flwr.data.tables import PARQUET, table_files

    try:
        splits = table_files(Path(path).expanduser())
        files = [Path(file) for file in _of_split(splits, settings.data)] if splits else []
        for file in files:
            file.open("rb").close()
        if not splits:
            return _images(settings, path)
    except OSError as error:
        raise ConfigError(f"{KEY} = {path!r}: may not be opened: {error.strerror}") from None
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) > 1:
        raise ConfigError(f"{KEY} = {path!r}: {', '.join(sorted(kinds))} files; must be of one kind")
    return (_parquet if kinds == {PARQUET} else _lines)(settings, path, files, own)


def _of_split(splits: dict[str, Any], settings: DataSettings) -> Any:
    if settings.split not in splits:
        raise ConfigError(f"split = {settings.split!r}: not among {', '.join(splits)} under data-path")
    return splits[settings.split]


def _columns(features: Any, settings: Settings) -> Columns:
    from lalora_flwr.data.columns import find_columns

    return find_columns(features, settings.data, settings.task, key="{}-column")


def _images(settings: Settings, path: str) -> tuple[Dataset, Columns]:
    """Of a folder with one sub-folder a class; what is read here are names only."""
    from datasets import Dataset, Features, Image, Value

    from lalora_flwr.data.image_folder import class_folders, images_in
    from lalora_flwr.data.tables import split_named

    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{KEY} = {path!r}: no such file or folder")
    places = class_folders(folder, split_named)
    if not places:
        raise ConfigError(f"{KEY} = {path!r}: cannot be read: no table and no sub-folder of images a class")
    found = [(str(image), kind.name) for kind in _of_split(places, settings.data) for image in images_in(kind)]
    features = Features({"image": Image(), "label": Value("string")})
    columns = {"image": [image for image, _ in found], "label": [name for _, name in found]}
    return Dataset.from_dict(columns, features), _columns(features, settings)


def _lines(settings: Settings, path: str, files: Sequence[Path], own: OwnRecords) -> tuple[Dataset | None, Columns | None]:
    from datasets import Dataset, Features, Value

    from lalora_flwr.data.own_lines import SPLITTERS, read_lines
    from lalora_flwr.data.readers import READERS

    if not {file.suffix.lower() for file in files} <= set(READERS):
        kind = files[0].suffix or "nameless"
        raise ConfigError(f"{KEY} = {path!r}: {kind} files; must be of one kind of {', '.join(READERS)}, .parquet")
    named = [] if files[0].suffix.lower() in SPLITTERS else _named(settings)
    read = []
    for file in files:
        try:
            read.append(read_lines(file, named))
        except (OSError, ValueError) as error:
            log.error("data-path: %s: %s", file.name, error)
            own.broken_files.append(file.name)
    names = list(dict.fromkeys(itertools.chain.from_iterable(lines.names for lines in read)))
    if not names:
        return None, None
    values: dict[str, list[str | None]] = {name: [] for name in names}
    for lines in read:
        own.left_out.update(lines.left_out)
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
    for key, name in needed.items():
        if not name:
            raise ConfigError(f"{key}: must be named for JSON lines, which have no header that all records share")
    pair = [] if data.text_pair in ("", "none") or settings.task == "image" else [data.text_pair]
    return list(dict.fromkeys([*needed.values(), *pair]))


def _parquet(settings: Settings, path: str, files: Sequence[Path], own: OwnRecords) -> tuple[Dataset | None, Columns | None]:
    from datasets import Dataset, Features

    from lalora_flwr.data.own_lines import LONGEST_ROW, TOO_LONG
    from lalora_flwr.data.own_parquet import OpenParquet, holds_paths, kinds_of

    opened: list[OpenParquet] = []
    kinds: dict[str, Any] = {}  # the type of a column is that of the first file with it
    for file in files:
        try:
            opened.append(OpenParquet(file))
        except Exception as error:  # pyarrow and datasets raise many types for a broken schema
            log.error("data-path: %s: %s", file.name, error)
            own.broken_files.append(file.name)
    for one in opened:
        for name, kind in one.features.items():
            kinds.setdefault(name, kind)
    if not kinds:
        return None, None
    columns = _columns(Features(kinds), settings)
    image = kinds.get(columns.image)
    if any(columns.image in one.features and holds_paths(one.features[columns.image]) != holds_paths(image) for one in opened):
        raise ConfigError(f"{KEY} = {path!r}: the files differ in what column {columns.image!r} holds: paths or images")
    rows = []
    for row in itertools.chain.from_iterable(one.rows(columns, own.left_out) for one in opened):
        if isinstance(picture := row.get(columns.image), dict):  # a path in it could name any file of the machine
            held = picture.get("bytes")
            row = {**row, columns.image: None if held is None else {"bytes": held, "path": None}}
        if any(_size(value) >= LONGEST_ROW for value in row.values()):
            own.left_out[TOO_LONG] += 1
        else:
            rows.append(row)
    features = kinds_of(columns, image)
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features), columns


def _size(value: Any) -> int:
    """Of a text or bytes, alone or in an image: columns hold 2 GiB, and one value beyond would take all of them with it."""
    if isinstance(value, dict):
        return max(map(_size, value.values()), default=0)
    return len(value) if isinstance(value, str | bytes) else 0


def _encoded(rows: Rows, encode: Encode, vocabulary: int, segments: int, left_out: Counter[str]) -> tuple[RecordSet, Rows]:
    """The rows as the model's records, without those that it cannot take, and the rows that are left."""
    try:
        records = encode(rows)
    except ConfigError:
        raise
    except Exception:
        log.exception("a record cannot be encoded; trying one by one")
        rows, left = _only(rows, [i for i in range(len(rows)) if _can_encode(rows.take([i]), encode)])
        left_out["the model's tokenizer fails on it"] += left
        records = encode(rows)
    if isinstance(records, TextRecords):
        good = list(_known_tokens(records, vocabulary, segments))
        if len(good) < len(records):
            rows, left = _only(rows, good)
            left_out["it holds no token, or one that the model has no embedding for"] += left
            records = encode(rows)
    return records, rows


def _only(rows: Rows, good: list[int]) -> tuple[Rows, int]:
    return rows.take(good), len(rows) - len(good)


def _can_encode(row: Rows, encode: Encode) -> bool:
    try:
        encode(row)
    except Exception:  # whatever a tokenizer makes of a text
        return False
    return True


def _known_tokens(records: TextRecords, vocabulary: int, segments: int) -> Iterator[int]:
    for i, tokens in enumerate(records.tokens):
        known = len(tokens) and (not vocabulary or int(tokens.max()) < vocabulary)
        if known and (records.types is None or not segments or int(records.types[i].max()) < segments):
            yield i
