"""CSV, TSV and JSON lines as tables of texts, in memory.

Every value stays the text that the file holds. No type is guessed for a column, since a guess depends on all of its values:
one record more would turn 1 into 1.0, true into True or a day into a time in all the others.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Features, Value

from lalora_flwr.ground.words import one_form

Table = tuple[list[str], list[list[str | None]]]  # names of the columns, and the rows; None: missing
Json = str | bool | None | list["Json"] | dict[str, "Json"]  # as `parsed_json` gives it: numbers are texts


@dataclass(frozen=True)
class TextForm:
    """How text files are written; as the settings ``data.encoding`` and ``data.separator``."""

    encoding: str = "auto"
    separator: str = "auto"

    def text_of(self, file: Path) -> str:
        """A file's text, with line ends as they are.

        Raises:
            ValueError: it is of another encoding; with the line, and the setting that names it.
        """
        data = file.read_bytes()
        encoding = self.encoding
        if encoding == "auto":
            encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
        try:
            return data.decode(encoding)
        except UnicodeError as error:
            at = error.start if isinstance(error, UnicodeDecodeError) else 0
            line = data[:at].count(b"\n") + 1
            name = "UTF-8" if encoding == "utf-8-sig" else encoding
            raise ValueError(f"line {line} is not {name}; set data.encoding, to latin-1 or cp1252 for instance") from None

    def delimiter(self, first: str) -> str:
        """What separates the fields of a CSV file with this first line."""
        if self.separator != "auto":
            return DELIMITERS[self.separator]
        counts = {delimiter: first.count(delimiter) for delimiter in DELIMITERS.values()}
        return "," if counts[","] else max(counts, key=lambda delimiter: counts[delimiter])


DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}


def read_texts(files: Sequence[str], form: TextForm | None = None) -> Dataset:
    """Files of one split, one after the other; a column that a file lacks is missing in its rows.

    Raises:
        ValueError: a file that is not what its name says, with the line; OSError, UnicodeDecodeError.
    """
    columns: dict[str, list[str | None]] = {}
    count = 0
    for file in files:
        try:
            names, rows = READERS[Path(file).suffix.lower()](Path(file), form or TextForm())
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{Path(file).name}: {error}") from None
        for name in names:
            columns.setdefault(name, [None] * count)
        count += len(rows)
        for position, name in enumerate(names):
            columns[name] += [row[position] for row in rows]
        for values in columns.values():
            values += [None] * (count - len(values))
    if not columns:
        raise ValueError("empty: no columns")
    return Dataset.from_dict(columns, Features({name: Value("string") for name in columns}))


def _csv(file: Path, form: TextForm) -> Table:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    text = form.text_of(file)
    delimiter = form.delimiter(next((line for line in text.splitlines() if line.strip()), ""))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    return _table((reader.line_num, row) for row in reader)


def _tsv(file: Path, form: TextForm) -> Table:
    """As GLUE and the IANA type: a quote is a character, and nothing is escaped."""
    lines = form.text_of(file).split("\n")
    return _table((number, line.rstrip("\r").split("\t")) for number, line in enumerate(lines, 1))


def _table(lines: Iterator[tuple[int, list[str]]]) -> Table:
    """Rows under the names in the first line. Only an empty field is missing: NA and null are text that people write."""
    filled = ((number, fields) for number, fields in lines if fields not in ([], [""]))
    names = [one_form(name.strip()) or f"column {i}" for i, name in enumerate(next(filled, (0, []))[1], 1)]
    if len(set(names)) < len(names):
        raise ValueError(f"a column occurs twice among {', '.join(names)}")
    rows: list[list[str | None]] = []
    for number, fields in filled:
        if any(fields[len(names) :]):
            raise ValueError(f"line {number}: {len(fields)} fields under {len(names)} names")
        rows.append([field or None for field in fields[: len(names)]] + [None] * (len(names) - len(fields)))
    return names, rows


def _json(file: Path, form: TextForm) -> Table:
    text = form.text_of(file)
    found: list[Json] = []
    if text.lstrip().startswith("["):
        whole = parsed_json(text)
        found = whole if isinstance(whole, list) else [whole]
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    found.append(parsed_json(line))
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from None
    records = [one_form_of_keys(record) for record in found if isinstance(record, dict)]
    if len(records) < len(found):
        raise ValueError("must hold one JSON object per line")
    names = list(dict.fromkeys(name for record in records for name in record))
    return names, [[text_of_json(record.get(name)) for name in names] for record in records]


def parsed_json(text: str) -> Json:
    parsed: Json = json.loads(text, parse_int=str, parse_float=str, parse_constant=lambda _: None)  # numbers as they are written
    return parsed


def one_form_of_keys(record: dict[str, Json]) -> dict[str, Json]:
    """An object with its names in the form of columns; of two that then are the same, one as it is written goes first."""
    return {one_form(name): value for name, value in record.items()} | {n: v for n, v in record.items() if one_form(n) == n}


def text_of_json(value: Json) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


READERS: dict[str, Callable[[Path, TextForm], Table]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
}
