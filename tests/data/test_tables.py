"""Files as splits of records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from lalora_flwr.data.tables import folder_of, from_files, in_order
from lalora_flwr.ground.errors import ConfigError
from tests.data.files import png, write, write_csv
from tests.data.kinds import ROWS, csv, json_array, jsonl, marked, parquet, tsv, upper_case


@pytest.mark.parametrize("make", [csv, tsv, jsonl, json_array, parquet, upper_case, marked])
def test_a_file_holds_these_records(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    splits = from_files("data.name", str(make(tmp_path)))
    assert {name: table[:] for name, table in splits.items()} == {"train": ROWS}


def test_a_quote_in_a_tsv_is_a_character(tmp_path: Path) -> None:
    file = write(tmp_path / "t.tsv", 'text\tlabel\n"Open\ta\nshut" it\tb\n"both"\tc\n')
    assert from_files("k", str(file))["train"][:] == {"text": ['"Open', 'shut" it', '"both"'], "label": ["a", "b", "c"]}


def test_only_an_empty_field_is_missing(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", 'text,label,more\nNone,,x\n,-,\n"",N/A\n#N/A,1,""\n\n')
    wanted = {"text": ["None", None, None, "#N/A"], "label": [None, "-", "N/A", "1"], "more": ["x", None, None, None]}
    assert from_files("k", str(file))["train"][:] == wanted


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_one_record_changes_nothing_about_the_others(tmp_path: Path, suffix: str) -> None:
    """No column gets a type that depends on all of its values."""
    values = ["1", "007", "true", "2020-01-01", "1.0", "1e3"]

    def line(text: str) -> str:
        number = text in ("1", "1.0", "1e3", "true")
        return f'{{"text": {text if number else f"""{chr(34)}{text}{chr(34)}"""}}}' if suffix == "jsonl" else f'"{text}"'

    head = "" if suffix == "jsonl" else "text\n"
    for value in values:
        for other in ["word", "2", "2.5"]:
            lines = f"{head}{line(value)}\n{line(other)}\n".replace('"', "" if suffix != "jsonl" else '"')
            read = from_files("k", str(write(tmp_path / f"t.{suffix}", lines)))["train"]["text"][:]
            assert read == [value, other]


def test_missing_keys_and_nulls_of_json_are_missing(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", '{"text": "a"}\n\n{"label": 2, "text": null}\n{"text": "", "label": NaN}\n')
    assert from_files("k", str(file))["train"][:] == {"text": ["a", None, ""], "label": [None, "2", None]}


def test_parquet_keeps_its_types_and_images(tmp_path: Path) -> None:
    kinds = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"]), "n": Value("int64")})
    images = [{"bytes": png(i), "path": None} for i in range(3)]
    Dataset.from_dict({"image": images, "label": [1, 0, 1], "n": [5, 6, 7]}, kinds).to_parquet(tmp_path / "t.parquet")
    read = from_files("k", str(tmp_path / "t.parquet"))["train"]
    assert read.features == kinds and read["label"][:] == [1, 0, 1]
    assert [image.getpixel((0, 0))[0] for image in read["image"]] == [0, 1, 2]


NAMES = {
    "train": ["train", "train-00000", "Training_2", "other", "tests", "contest"],
    "test": ["test", "test.part1", "testing-a"],
    "validation": ["dev", "val_1", "valid", "validation"],
}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_folder_is_split_by_the_names_of_its_files(tmp_path: Path, kind: str) -> None:
    for split, names in NAMES.items():
        for name in names:
            if kind == "csv":
                write_csv(tmp_path / f"{name}.csv", [(name, split)])
            else:
                Dataset.from_dict({"text": [name], "label": [split]}).to_parquet(tmp_path / f"{name}.parquet")
    write(tmp_path / ".hidden.csv", "garbage")
    write(tmp_path / "README.md", "about")
    splits = from_files("k", str(tmp_path))
    assert {split: sorted(table["text"]) for split, table in splits.items()} == {s: sorted(n) for s, n in NAMES.items()}
    assert all(set(table["label"]) == {split} for split, table in splits.items())


def test_files_of_a_glob_are_all_train(tmp_path: Path) -> None:
    for name in ["a/train", "a/test", "b/x"]:
        write_csv(tmp_path / f"{name}.csv", [(name, "x")])
    for pattern, wanted in {"a/*.csv": ["a/test", "a/train"], "*/*.csv": ["a/test", "a/train", "b/x"], "**/x.*": ["b/x"]}.items():
        assert {s: t["text"][:] for s, t in from_files("k", str(tmp_path / pattern)).items()} == {"train": wanted}


def test_a_file_may_lack_a_column_of_another(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [("x", "1")])
    write_csv(tmp_path / "b.csv", [("2", "y")], names="label,text")
    write_csv(tmp_path / "c.csv", [("z",)], names="text")
    assert from_files("k", str(tmp_path))["train"][:] == {"text": ["x", "y", "z"], "label": ["1", "2", None]}


@pytest.mark.parametrize("make", [csv, jsonl, parquet])
def test_brackets_in_a_path_are_no_pattern(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    folder = tmp_path / "set[1]*"
    folder.mkdir()
    file = make(folder)
    for path in (file, folder):
        assert from_files("k", str(path))["train"][:] == ROWS


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    csv(tmp_path)
    assert len(from_files("k", "~/t.csv")["train"]) == 4 == len(from_files("k", "~/*.csv")["train"])


def test_classes_of_other_parquet_files_are_never_mistaken(tmp_path: Path) -> None:
    for name, names in (("a", ["x", "y"]), ("b", ["y", "x"])):
        kinds = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        Dataset.from_dict({"text": ["t"], "label": [0]}, kinds).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ConfigError, match=r"^k = .*: cannot be read: the files differ in the classes of column 'label'$"):
        from_files("k", str(tmp_path))
    (tmp_path / "b.parquet").rename(tmp_path / "test.parquet")
    splits = from_files("k", str(tmp_path))
    assert {split: table.features["label"].names for split, table in splits.items()} == {"train": ["x", "y"], "test": ["y", "x"]}


def test_a_trailing_comma_moves_nothing(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", "text,label\na,b,\nc,d,\n")
    assert from_files("k", str(file))["train"][:] == {"text": ["a", "c"], "label": ["b", "d"]}


def test_paths_in_files_start_where_the_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    csv(tmp_path)
    (tmp_path / "a").mkdir()
    for pattern in ("t.csv", ".", "*.csv", "a", f"{tmp_path}/*/*.csv"):
        assert folder_of(pattern) == (tmp_path / "a" if pattern == "a" else tmp_path)


def test_numbers_are_ordered_by_value_and_words_by_letter() -> None:
    assert in_order({"10", "9", "-1", "2.5"}) == ("-1", "2.5", "9", "10")
    assert in_order({"10", "9", "b", "a"}) == ("10", "9", "a", "b")
    assert in_order({"²", "--3", "3", "nan", "inf"}) == tuple(sorted({"²", "--3", "3", "nan", "inf"}))
    assert in_order(set()) == ()
