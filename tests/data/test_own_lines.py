"""Rows of a real site's files: what a good file holds is read as ever, and a bad row costs itself and no other."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lalora_flwr.data.limits import LONGEST_ROW
from lalora_flwr.data.own_lines import Lines, read_lines
from lalora_flwr.data.readers import read_texts
from tests.data.files import write

NAMES = ["text", "label"]
TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\r\n"), max_size=12)  # a row is a line
ROWS = st.lists(st.tuples(TEXT, TEXT), max_size=6)


def read(name: str, content: bytes, columns: list[str] | None = None, longest: int = LONGEST_ROW) -> Lines:
    with TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(content)
        return read_lines(file, columns or [], longest)


def as_csv(rows: list[tuple[str, str]], quoting: int = csv.QUOTE_MINIMAL) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, quoting=quoting).writerows([tuple(NAMES), *rows])  # type: ignore[arg-type]
    return out.getvalue().encode()


@given(ROWS, st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
@example([('a "fine" film, they say', ""), ("", "x"), ('"', ",")], csv.QUOTE_MINIMAL)
def test_what_a_csv_writer_writes_is_read_back(rows: list[tuple[str, str]], quoting: int) -> None:
    found = read("t.csv", as_csv(rows, quoting))
    assert found.names == NAMES and not found.left_out
    wanted = [[value or None for value in row] for row in rows if quoting == csv.QUOTE_ALL or row != ("", "")]
    assert [row for row in found.rows if row != [None, None]] == [row for row in wanted if row != [None, None]]


@given(st.lists(st.tuples(*[st.text("ab \"',;\u00e4\u2028", max_size=6)] * 2), max_size=5))
def test_a_good_file_is_read_as_a_public_one(rows: list[tuple[str, str]]) -> None:
    """Against the strict reader."""
    with TemporaryDirectory() as folder:
        for suffix, content in {
            "csv": as_csv(rows),
            "tsv": "".join(f"{a}\t{b}\n" for a, b in [tuple(NAMES), *rows]).encode(),
            "jsonl": "".join(json.dumps(dict(zip(NAMES, row, strict=True))) + "\n" for row in rows).encode(),
        }.items():
            file = Path(folder) / f"t.{suffix}"
            file.write_bytes(content)
            if suffix == "jsonl" and not rows:
                continue  # a strict reader knows no columns then
            strict = read_texts([str(file)])
            found = read_lines(file, NAMES)
            assert found.rows == [[row[name] for name in NAMES] for row in strict] and not found.left_out


GOOD = [b"a fine film,good", b'"so, so",bad', b'"it is 5"" long",good', b"NA,"]
BAD = [
    b'"never closed,good',
    b'"closed too "early",good',
    b"too,many,fields",
    b"not utf-8 \xff\xfe,good",
    b"\x80",
    b'"',
    b'x,y,"',
    b'it is 5" long,bad',
    b'"two lines',
    b'lines",good',
]


@given(st.lists(st.sampled_from(range(len(GOOD) + len(BAD))), max_size=8))
def test_a_bad_row_costs_itself_alone(chosen: list[int]) -> None:
    rows = [(GOOD + BAD)[i] for i in chosen]
    whole = read("t.csv", b"text,label\n" + b"\n".join(rows) + b"\n")
    alone = [read("t.csv", b"text,label\n" + row + b"\n") for row in rows]
    assert whole.rows == [row for one in alone for row in one.rows]
    assert whole.left_out.total() == sum(i >= len(GOOD) for i in chosen)


@pytest.mark.parametrize("bad", BAD)
def test_every_bad_row_is_left_out_and_counted(bad: bytes) -> None:
    found = read("t.csv", b"text,label\n" + GOOD[0] + b"\n" + bad + b"\n" + GOOD[1] + b"\r\n" + GOOD[2])
    assert found.rows == [["a fine film", "good"], ["so, so", "bad"], ['it is 5" long', "good"]]
    assert found.left_out.total() == 1


def test_an_open_quote_swallows_no_other_record() -> None:
    """Rows of several lines would: one record more, and all up to the next quote are gone."""
    others = [b"the plot is bad,bad", b"a fine actor,good"] * 4
    for opened in (b'"very very good film', b'very good,"good'):
        for closing in (b'the film is 5",good', b'"\nthe plot is bad",bad'):
            with_it, without = ([*([opened] if one else []), *others, closing] for one in (True, False))
            found = [read("t.csv", b"text,label\n" + b"\n".join(rows) + b"\n") for rows in (with_it, without)]
            assert found[0].rows == found[1].rows and len(found[0].rows) == len(others)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("t.tsv", [b"a\tb\tc", b"\xff\tgood"]),
        (
            "t.jsonl",
            [
                b"{",
                b'"text"',
                b"[1]",
                b"3",
                b'{"text": "\xff"}',
                b"[" * 100_000,
                b'{"text": "\\ud800"}',
                b'{"label": "x\\udfff"}',
            ],
        ),
    ],
)
def test_bad_lines_of_tsv_and_json_are_left_out(name: str, bad: list[bytes]) -> None:
    good = b"a\tgood" if name.endswith("tsv") else b'{"text": "a", "label": "good", "more": [1]}'
    head = b"text\tlabel\n" if name.endswith("tsv") else b""
    found = read(name, head + b"\n".join(line for one in bad for line in (one, good, b"")) + b"\n", NAMES)
    assert found.rows == [["a", "good"]] * len(bad) and found.left_out.total() == len(bad)


def test_json_columns_are_the_owners_whatever_the_records_hold() -> None:
    found = read("t.jsonl", b'{"sentence1": "x", "sentence2": "y", "label": 1}\n{"text": "a", "label": null}\n', NAMES)
    assert found.names == NAMES and found.rows == [[None, "1"], ["a", None]]


def test_a_giant_field_is_no_record() -> None:
    for giant in (b'"' + b"x" * 60 + b'",good', b"x" * 60 + b",good", b'"' + b"x" * 200):
        found = read("t.csv", b"text,label\n" + giant + b"\na,good\n", longest=50)
        assert found.rows == [["a", "good"]] and found.left_out.total() == 1


@pytest.mark.parametrize("content", [b"", b"\n\n", b"text,text\n", b"\xff,label\n", b'"text,label\n'])
def test_a_first_line_that_names_no_columns_is_no_header(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        read("t.csv", content)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    assert read_lines(write(tmp_path / "t.csv", "\ufefftext,label\na,b\n"), []).names == NAMES
