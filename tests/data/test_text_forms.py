"""Encodings and separators are found, or the error names the key that sets them; tables that `datasets` saved are read."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from lalora_flwr.data.class_names import declared_labels
from lalora_flwr.data.data_set import data_set
from lalora_flwr.data.own_lines import read_lines
from lalora_flwr.data.own_records import own_records
from lalora_flwr.data.readers import TextForm
from lalora_flwr.data.tables import from_files
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.lists import joined, listed
from lalora_flwr.settings import DataSettings
from tests.data.files import keep, settings

ROWS = [("text", "label"), ("naïve, café", "gut"), ("schön; grün", "schlecht")]
WANTED = {"text": ["naïve, café", "schön; grün"], "label": ["gut", "schlecht"]}


def written(folder: Path, separator: str, encoding: str, end: str = "\n") -> str:
    lines = [separator.join(f'"{field}"' for field in row) for row in ROWS]
    path = folder / "t.csv"
    path.write_bytes((end.join(lines) + end).encode(encoding))
    return str(path)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_they_are_found(separator: str, encoding: str, end: str, tmp_path: Path) -> None:
    assert from_files("k", written(tmp_path, separator, encoding, end))["train"][:] == WANTED


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16-le"])
def test_other_encodings_are_named_in_the_error_and_read_with_the_key(encoding: str, tmp_path: Path) -> None:
    path = written(tmp_path, ",", encoding)
    if encoding != "utf-16-le":
        with pytest.raises(ConfigError, match=r"t\.csv: line 2 is not UTF-8; set data\.encoding"):
            from_files("k", path)
    assert from_files("k", path, TextForm(encoding))["train"][:] == WANTED


def test_the_key_for_the_separator_wins(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b;c\n1,2;3\n")
    assert from_files("k", str(tmp_path / "t.csv"))["train"].column_names == ["a", "b;c"]
    assert from_files("k", str(tmp_path / "t.csv"), TextForm(separator="semicolon"))["train"].column_names == ["a,b", "c"]


def test_the_settings_reach_the_files(tmp_path: Path) -> None:
    wanted = settings(name=f"file:{written(tmp_path, '|', 'latin-1')}", encoding="latin-1", separator="pipe", test="hold-out:0.5")
    assert data_set(wanted).labels == ("gut", "schlecht")


@pytest.mark.parametrize("value", ["klingon", "", "utf\0-8"])
def test_an_encoding_that_there_is_not_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\.encoding = .*must be auto or an encoding that Python knows"):
        settings(encoding=value)


@pytest.mark.parametrize(("separator", "encoding"), [(";", "utf-8"), ("|", "utf-8"), (",", "utf-16")])
def test_a_sites_own_file_of_another_form_is_a_fault_of_its_layout(separator: str, encoding: str, tmp_path: Path) -> None:
    """So the site refuses, instead of answering with noise for nothing."""
    path = written(tmp_path, separator, encoding)
    with pytest.raises(ConfigError, match=r"^t\.csv: .*save it (with commas|as UTF-8)$"):
        own_records(settings(name="sites", labels="gut,schlecht", test="file:x.csv"), path, keep)


def test_a_byte_order_mark_of_utf_8_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(codecs.BOM_UTF8 + b"text,label\na,b\n")
    assert read_lines(tmp_path / "t.csv", []).names == ["text", "label"]


def saved(folder: Path, *, splits: bool) -> str:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    table = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features)
    made: Any = DatasetDict({"train": table, "test": table.select([0])}) if splits else table
    made.save_to_disk(str(folder))
    return str(folder)


@pytest.mark.parametrize("splits", [False, True])
def test_a_table_that_datasets_saved_is_read(splits: bool, tmp_path: Path) -> None:
    wanted = settings(name=f"file:{saved(tmp_path / 'kept', splits=splits)}", test="auto" if splits else "hold-out:0.5")
    assert data_set(wanted).labels == ("good", "bad")
    found = from_files("k", str(tmp_path / "kept"))
    assert set(found) == ({"train", "test"} if splits else {"train"}) and found["train"]["text"][:] == ["a", "b"]


@pytest.mark.parametrize("names", [("a, b", "c"), ('say "x"', "y"), ("café",), ("1", "2", "3")])
def test_names_with_commas_go_through_one_text(names: tuple[str, ...]) -> None:
    assert tuple(listed(joined(names))) == names


def test_names_are_in_one_unicode_form_and_without_blanks() -> None:
    assert listed('cafe\u0301, "a,b" ,, c ') == ["café", "a,b", "c"]
    assert declared_labels(DataSettings(labels='"a, b",c')) == ("a, b", "c")
