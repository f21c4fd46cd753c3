"""Files that cannot be read are one line."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lalora_flwr.data.tables import from_files
from lalora_flwr.ground.errors import ConfigError
from tests.data.files import png, write, write_images
from tests.data.kinds import csv, parquet


def nothing(folder: Path) -> Path:
    return folder / "none.csv"


def no_match(folder: Path) -> Path:
    return folder / "*.csv"


def empty_folder(folder: Path) -> Path:
    return folder


def images_without_class(folder: Path) -> Path:
    return write_images(folder, ["1.png", "2.png"])


def folder_of_others(folder: Path) -> Path:
    return write(folder / "a.txt", "x").parent


def unknown_kind(folder: Path) -> Path:
    return write(folder / "a.xlsx", "x")


def no_kind(folder: Path) -> Path:
    return write(folder / "a", "x")


def mixed_kinds(folder: Path) -> Path:
    return write(csv(folder).parent / "t.tsv", "text\nx\n").parent


def mixed_glob(folder: Path) -> Path:
    return mixed_kinds(folder) / "t.*"


def binary(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / f"a{suffix}").write_bytes(png(3) * 9)
        return folder / f"a{suffix}"

    make.__name__ = f"binary{suffix}"
    return make


def garbled(suffix: str, text: str, name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return write(folder / f"a{suffix}", text)

    make.__name__ = name
    return make


def cut_short(folder: Path) -> Path:
    file = parquet(folder)
    file.write_bytes(file.read_bytes()[:-40])
    return file


WRONG: list[tuple[Callable[[Path], Path], str]] = [
    (nothing, "no such file or folder"),
    (no_match, "no such file or folder"),
    (empty_folder, "cannot be read: no table and no sub-folder of images"),
    (images_without_class, "cannot be read: no table and no sub-folder of images"),
    (folder_of_others, "cannot be read: no table and no sub-folder of images"),
    (unknown_kind, r"\.xlsx files; must be of one kind of \.csv, \.tsv, \.jsonl"),
    (no_kind, r"nameless files; must be of one kind of"),
    (mixed_kinds, r"\.csv, \.tsv files; must be of one kind of"),
    (mixed_glob, r"\.csv, \.tsv files; must be of one kind of"),
    *((binary(suffix), "cannot be read: ") for suffix in (".csv", ".tsv", ".jsonl", ".parquet")),
    (garbled(".csv", "", "empty"), "cannot be read: empty"),
    (garbled(".jsonl", "\n", "blank"), "cannot be read: empty"),
    (garbled(".parquet", "", "empty_parquet"), "cannot be read: "),
    (garbled(".csv", "text,label\na,b,c\nd,e,f\n", "too_many_fields"), "a.csv: line 2: 3 fields under 2 names"),
    (garbled(".csv", 'text,label\na,b\n"c,d\n', "open_quote"), "cannot be read: a.csv: "),
    (garbled(".tsv", "text\tlabel\na\tb\nc\td\te\n", "too_many_tabs"), "a.tsv: line 3: 3 fields under 2 names"),
    (garbled(".csv", "text,text\na,b\n", "twice"), "a column occurs twice"),
    (garbled(".jsonl", '{"text": "a"}\n{"text": \n', "cut_json"), "a.jsonl: line 2: "),
    (garbled(".jsonl", '"a"\n', "no_object"), "must hold one JSON object per line"),
    (cut_short, "cannot be read: "),
]


@pytest.mark.parametrize(("make", "reason"), WRONG, ids=[make.__name__ for make, _ in WRONG])
def test_what_cannot_be_read_is_one_line(tmp_path: Path, make: Callable[[Path], Path], reason: str) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    path = str(make(folder))
    with pytest.raises(ConfigError, match=reason) as error:
        from_files("data.name", path)
    assert str(error.value).startswith(f"data.name = {path!r}: ") and len(str(error.value).splitlines()) == 1


def test_a_file_that_one_may_not_read_is_one_line() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        file = csv(folder)
        assert len(from_files("data.name", str(file))["train"])
        file.chmod(0)
        root = os.geteuid() == 0
        try:
            if root:  # who may read all
                os.seteuid(65534)
            with pytest.raises(ConfigError, match=r"^data.name = .*: cannot be read: .*Permission denied[^\n]*$"):
                from_files("data.name", str(file))
        finally:
            if root:
                os.seteuid(0)
