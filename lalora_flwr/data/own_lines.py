"""CSV, TSV and JSON lines of a real site, read so that no row can do anything to another.

A site has to answer whatever its files hold, and one record may not decide about others. So a row that is no row is
left out and counted, instead of failing its file: bytes that are not UTF-8, a quote that is never closed, too many fields, a
line that is no JSON object, a character that text cannot hold. What a file says about all of its rows is its layout and the
owner's: its name and its first line, which names the columns. Public files are read strictly (`lalora_flwr.data.readers`).
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lalora_flwr.data.limits import LONGEST_ROW
from lalora_flwr.data.readers import one_form_of_keys, parsed_json, text_of_json
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.words import is_text, one_form

Row = list[str | None]
OPEN_QUOTE = "the quotes in its line do not match, or it is too long"
TOO_LONG = "it is too long"
_FIELD = re.compile(rb'"((?:[^"]++|"")*+)"(?=,|\Z)|([^,"]*+)(?=,|\Z)')
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass
class Lines:
    """The rows of one file under the names of its columns, and how many rows were left out for which reason."""

    names: list[str]
    rows: list[Row] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def read_lines(file: Path, columns: Sequence[str], longest: int = LONGEST_ROW) -> Lines:
    """One file of a real site.

    Args:
        file: CSV, TSV or JSON lines, by its suffix.
        columns: for JSON lines, which have no header, the columns to read.
        longest: bytes; a line of as many or more is no record.

    Raises:
        OSError: the file cannot be read.
        ValueError: its first line is no header: not UTF-8, or a name twice.
        ConfigError: its first line shows another form than UTF-8 with commas, which is for the owner to mend.
    """
    data = file.read_bytes().removeprefix(_BYTE_ORDER_MARK)
    suffix = file.suffix.lower()
    if suffix not in SPLITTERS:
        return _json(data, list(columns), longest)
    if _names_columns_in_utf_16(data):
        raise ConfigError(f"{file.name}: is UTF-16; save it as UTF-8")
    first = data.partition(b"\n")[0]
    if suffix == ".csv" and b"," not in first and any(other in first for other in (b";", b"\t", b"|")):
        raise ConfigError(f"{file.name}: the names in its first line are not separated by commas; save it with commas")
    return _table(SPLITTERS[suffix](data, longest))


def _names_columns_in_utf_16(data: bytes) -> bool:
    """Whether the first line of a file names columns in UTF-16; one that is only garbled is no such file."""
    if not data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return False
    first = next(iter(data[:4096].decode("utf-16", errors="replace").splitlines()), "")
    return any(separator in first for separator in ",;\t|") and first.replace("\t", "").isprintable()


def _table(rows: Iterator[list[bytes] | None]) -> Lines:
    """Rows under the names in the first; None is a row that cannot be taken apart."""
    filled = (row for row in rows if row != [b""])
    first = next(filled, [])
    if first is None:
        raise ValueError("the first line names no columns: a quote in it is never closed")
    if not first:
        raise ValueError("empty: no columns")
    names = [one_form(name.decode().strip()) or f"column {i}" for i, name in enumerate(first, 1)]
    if len(set(names)) < len(names):
        raise ValueError(f"a column occurs twice among {', '.join(names)}")
    read = Lines(names)
    for row in filled:
        if row is None:
            read.left_out[OPEN_QUOTE] += 1
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


def _csv(data: bytes, longest: int) -> Iterator[list[bytes] | None]:
    """Rows of RFC 4180 that lie on one line each.

    A quote that is still open where its line ends spoils this line and no other. If a row could go on in the next line, a
    record with an open quote would swallow all records up to the next quote, and take them out of the sum.
    """
    for line in data.splitlines():
        yield _csv_row(line, longest)


def _csv_row(line: bytes, longest: int) -> list[bytes] | None:
    """The fields of a line; None if it cannot be taken apart."""
    row: list[bytes] = []
    position = 0
    while len(line) < longest and (found := _FIELD.match(line, position)):
        quoted, bare = found.groups()
        row.append(bare if quoted is None else quoted.replace(b'""', b'"'))
        position = found.end()
        if position == len(line):
            return row
        position += 1  # behind the comma
    return None


def _tsv(data: bytes, longest: int) -> Iterator[list[bytes] | None]:
    """A quote is a character, and nothing is escaped."""
    for line in data.split(b"\n"):
        yield line.rstrip(b"\r").split(b"\t") if len(line) < longest else None


SPLITTERS: dict[str, Callable[[bytes, int], Iterator[list[bytes] | None]]] = {".csv": _csv, ".tsv": _tsv}


def _json(data: bytes, columns: list[str], longest: int) -> Lines:
    read = Lines(columns)
    for line in data.split(b"\n"):
        if not line.strip():
            continue
        if len(line) >= longest:
            read.left_out[TOO_LONG] += 1
            continue
        try:
            record = parsed_json(line.decode())
            row = None
            if isinstance(record, dict):
                record = one_form_of_keys(record)
                row = [text_of_json(record.get(name)) for name in columns]
        except UnicodeDecodeError:
            read.left_out["it is not UTF-8"] += 1
            continue
        except (ValueError, RecursionError):
            row = None
        if row is None:
            read.left_out["it is no JSON object"] += 1
            continue
        if all(value is None or is_text(value) for value in row):
            read.rows.append(row)
        else:
            read.left_out["it holds half a character"] += 1
    return read
