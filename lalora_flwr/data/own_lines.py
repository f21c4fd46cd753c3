"""CSV, TSV and JSON lines of a real site, read so that no row can do anything to another.

A site has to answer whatever its files hold, and one record may not decide about others. So a row that is no row is
left out and counted, instead of failing its file: bytes that are not UTF-8, a quote that is never closed, too many fields, a
line that is no JSON object, a character that text cannot hold. What a file says about all of its rows is its layout and the
owner's: its name and its first line, which names the columns. Public files are read strictly (`lalora_flwr.data.readers`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lalora_flwr.data.readers import parsed_json, text_of_json

Row = list[str | None]
LONGEST_ROW = 1 << 24  # bytes; what is longer is no record
_FIELD = re.compile(rb'"((?:[^"]++|"")*+)"(?=[,\r\n]|\Z)|([^,\r\n"][^,\r\n]*+|)(?=[,\r\n]|\Z)')
_ROW_END = re.compile(rb"\r\n|\n|\r|\Z")
_LINE = re.compile(rb"[^\r\n]*+(?:\r\n|\n|\r|\Z)")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass
class Lines:
    """The rows of one file under the names of its columns, and how many rows were left out for which reason."""

    names: list[str]
    rows: list[Row] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def read_lines(file: Path, columns: Sequence[str]) -> Lines:
    """One file of a real site.

    Args:
        file: CSV, TSV or JSON lines, by its suffix.
        columns: for JSON lines, which have no header, the columns to read.

    Raises:
        OSError: the file cannot be read.
        ValueError: its first line is no header: not UTF-8, or a name twice.
    """
    data = file.read_bytes().removeprefix(_BYTE_ORDER_MARK)
    suffix = file.suffix.lower()
    return _json(data, list(columns)) if suffix not in SPLITTERS else _table(SPLITTERS[suffix](data))


def _table(rows: Iterator[list[bytes] | None]) -> Lines:
    """Rows under the names in the first; None is a row that cannot be taken apart."""
    filled = (row for row in rows if row != [b""])
    first = next(filled, [])
    if first is None:
        raise ValueError("the first line names no columns: a quote in it is never closed")
    if not first:
        raise ValueError("empty: no columns")
    names = [name.decode().strip() or f"column {i}" for i, name in enumerate(first, 1)]
    if len(set(names)) < len(names):
        raise ValueError(f"a column is there twice among {', '.join(names)}")
    read = Lines(names)
    for row in filled:
        if row is None:
            read.left_out["the quotes in it do not match, or it is too long"] += 1
        elif any(row[len(names) :]):
            read.left_out["it has more fields than there are columns"] += 1
        else:
            read.rows.append([None] * len(names))
            try:
                read.rows[-1][: len(row)] = [value.decode() or None for value in row[: len(names)]]
            except UnicodeDecodeError:
                read.rows.pop()
                read.left_out["it is not UTF-8"] += 1
    return read


def _csv(data: bytes) -> Iterator[list[bytes] | None]:
    """Rows of RFC 4180, which may span lines inside of quotes.

    A row whose quotes do not match spoils the line that it begins with and no other: reading goes on behind that line,
    so that an unclosed quote does not swallow the rows after it. (Where two broken rows and what lies between them can be
    read as one good row of several lines, they are that row: no reader can know better.)
    """
    position, width = 0, 0
    while position < len(data):
        row, end = _csv_row(data, position)
        line = _LINE.match(data, position)
        assert line is not None  # matches anything
        if row is not None and width and len(row) != width and end > line.end():
            row = None  # over several lines, and not one field a column: a quote that took that of a later row for its end
        if row is None:
            end = line.end()
        elif row != [b""]:
            width = width or len(row)
        yield row
        position = end


def _csv_row(data: bytes, position: int) -> tuple[list[bytes] | None, int]:
    """The fields of the row that begins at ``position``, and where the next row begins; None if there is no row."""
    limit, row = position + LONGEST_ROW, []
    while (found := _FIELD.match(data, position, limit)) and found.end() < limit:
        quoted, bare = found.groups()
        row.append(bare if quoted is None else quoted.replace(b'""', b'"'))
        position = found.end()
        if data[position : position + 1] != b",":
            end = _ROW_END.match(data, position)
            return (None, position) if end is None else (row, end.end())
        position += 1
    return None, position


def _tsv(data: bytes) -> Iterator[list[bytes]]:
    """A quote is a character, and nothing is escaped."""
    for line in data.split(b"\n"):
        yield line.rstrip(b"\r").split(b"\t")


SPLITTERS: dict[str, Callable[[bytes], Iterator[list[bytes] | None]]] = {".csv": _csv, ".tsv": _tsv}


def _json(data: bytes, columns: list[str]) -> Lines:
    read = Lines(columns)
    for line in data.split(b"\n"):
        if not line.strip():
            continue
        try:
            record = parsed_json(line.decode())
        except UnicodeDecodeError:
            read.left_out["it is not UTF-8"] += 1
            continue
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            read.left_out["it is no JSON object"] += 1
            continue
        row = [text_of_json(record.get(name)) for name in columns]
        if all(value is None or _is_text(value) for value in row):
            read.rows.append(row)
        else:
            read.left_out["it holds half a character"] += 1
    return read


def _is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: JSON can name half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
