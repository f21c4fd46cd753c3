"""Files as splits of records, and the hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from lalora_flwr.data.tables import folder_of, from_files, from_hub, in_order
from lalora_flwr.ground.errors import ConfigError
from tests.data.files import png, write, write_csv, write_images

ROWS = {"text": ["a fine film", "NA", "null", 'so "good", they say'], "label": ["good", "bad", "nan", "good"]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def csv(folder: Path) -> Path:
    lines = ["text,label", "a fine film,good", "NA,bad", "null,nan", '"so ""good"", they say",good']
    return write(folder / "t.csv", "\n".join(lines) + "\n")


def tsv(folder: Path) -> Path:
    lines = ["text\tlabel", "a fine film\tgood", "NA\tbad", "null\tnan", 'so "good", they say\tgood']
    return write(folder / "t.tsv", "\r\n".join(lines) + "\r\n")


def jsonl(folder: Path) -> Path:
    Dataset.from_dict(ROWS).to_json(folder / "t.jsonl", lines=True)
    return folder / "t.jsonl"


def json_array(folder: Path) -> Path:
    Dataset.from_dict(ROWS).to_json(folder / "t.json", lines=False)
    return folder / "t.json"


def parquet(folder: Path) -> Path:
    Dataset.from_dict(ROWS).to_parquet(folder / "t.parquet")
    return folder / "t.parquet"


def upper_case(folder: Path) -> Path:
    return csv(folder).rename(folder / "T.CSV")


def marked(folder: Path) -> Path:
    """As Excel writes it: with a byte order mark."""
    return write(folder / "m.csv", "\ufeff" + csv(folder).read_text())


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


def classes(splits: DatasetDict) -> dict[str, list[tuple[int, str]]]:
    """The number in each image, and its class by name."""
    return {
        split: sorted((row["image"].getpixel((0, 0))[0], table.features["label"].int2str(row["label"])) for row in table)
        for split, table in splits.items()
    }


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    names = ["dog/1.png", "cat/test-2.png", "cat/deep/3.PNG", "test/4.png"]  # "test" holds no folders: a class like any
    folder = write_images(tmp_path / "images", names)
    write(folder / "cat" / "notes.txt", "x")
    write(folder / "cat" / ".hidden.png", "x")
    (folder / "stray.jpg").write_bytes(png(9))
    splits = from_files("k", str(folder))
    assert splits["train"].features["label"].names == ["cat", "dog", "test"]
    assert classes(splits) == {"train": [(0, "dog"), (1, "cat"), (2, "cat"), (3, "test")]}


def test_sub_folders_may_be_splits_of_classes(tmp_path: Path) -> None:
    names = ["train/10/1.png", "train/9/1.png", "Test/9/1.png", "Test/11/1.png", "val/9/1.png", "extra/9/1.png"]
    splits = from_files("k", str(write_images(tmp_path, names)))
    assert {tuple(table.features["label"].names) for table in splits.values()} == {("9", "10", "11")}
    wanted = {"train": [(0, "10"), (1, "9")], "test": [(2, "9"), (3, "11")], "validation": [(4, "9")], "extra": [(5, "9")]}
    assert classes(splits) == wanted


def test_one_class_alone_is_a_class(tmp_path: Path) -> None:
    splits = from_files("k", str(write_images(tmp_path, ["dog/1.png", "dog/2.png"])))
    assert classes(splits) == {"train": [(0, "dog"), (1, "dog")]}


def test_classes_of_other_parquet_files_are_never_mistaken(tmp_path: Path) -> None:
    for name, names in (("a", ["x", "y"]), ("b", ["y", "x"])):
        kinds = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        Dataset.from_dict({"text": ["t"], "label": [0]}, kinds).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ConfigError, match=r"^k = .*: cannot be read: the files differ in the classes of column 'label'$"):
        from_files("k", str(tmp_path))
    (tmp_path / "b.parquet").rename(tmp_path / "test.parquet")
    splits = from_files("k", str(tmp_path))
    assert {split: table.features["label"].names for split, table in splits.items()} == {"train": ["x", "y"], "test": ["y", "x"]}


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
    (garbled(".csv", "text,text\na,b\n", "twice"), "a column is there twice"),
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


class FakeHub:
    """A hub that holds one data set; Flower Datasets asks it through ``datasets``."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.error: Exception | None = None

    def __call__(self, **options: Any) -> DatasetDict:
        self.asked.append(options)
        if self.error:
            raise self.error
        return DatasetDict({s: Dataset.from_dict({"text": [s, "b", "a"], "label": ["x", "y", "x"]}) for s in ("train", "test")})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr("flwr_datasets.federated_dataset.datasets.load_dataset", fake)
    return fake


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("imdb", {"path": "imdb", "name": None}),
        ("owner/set", {"path": "owner/set", "name": None}),
        ("owner/set/config", {"path": "owner/set", "name": "config"}),
        ("owner/set/config@v1", {"path": "owner/set", "name": "config", "revision": "v1"}),
        ("imdb@0a1b", {"path": "imdb", "name": None, "revision": "0a1b"}),
    ],
)
def test_a_data_set_of_the_hub_is_asked_for_by_name(hub: FakeHub, name: str, asked: dict[str, Any]) -> None:
    read = from_hub(name, "test")
    assert read is not None and read["text"][:] == ["test", "b", "a"]
    assert hub.asked == [asked]


def test_a_split_that_the_hub_lacks_is_none(hub: FakeHub) -> None:
    assert from_hub("owner/set", "validation") is None


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no network\nand more"),
        ValueError("BuilderConfig 'x' not found; splits are no use"),
        RuntimeError("\n  Dataset scripts are no longer supported"),
        FileNotFoundError(),
    ],
)
def test_a_hub_out_of_reach_is_one_line(hub: FakeHub, error: Exception) -> None:
    hub.error = error
    reason = str(error).strip().split("\n")[0] or "unknown reason"
    with pytest.raises(ConfigError) as caught:
        from_hub("owner/set", "train")
    assert str(caught.value) == f"data.name = 'hub:owner/set': cannot be loaded: {reason}"
