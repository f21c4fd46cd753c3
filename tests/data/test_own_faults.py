"""Whatever state a real site's files are in, it has records or none, and one record decides about no other."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from lalora_flwr.data.limits import LONGEST_ROW
from lalora_flwr.data.own_records import OwnRecords, own_records
from lalora_flwr.data.pins import pinned
from lalora_flwr.data.records import Encode
from lalora_flwr.data.texts import TextRecords
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ledger.caps import Caps
from tests.data.files import column, keep, rows_of, settings, write, write_csv, write_images

SITES: dict[str, Any] = {"name": "sites", "test": "file:public.csv", "labels": "good,bad"}
NAMED = {"text": "text", "label": "label"}


def own(
    path: Path | str,
    task: str = "text",
    encode: Encode = keep,
    vocabulary: int = 0,
    longest: int = LONGEST_ROW,
    **more: Any,
) -> OwnRecords:
    return own_records(settings(task, **{**SITES, **more}), str(path), encode, vocabulary, longest=longest)


def test_the_owner_learns_what_was_found_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [("a", "bad"), ("b", "bad"), ("", "good"), ("c", "other"), ("d", ""), ("e", "bad", "f")]
    found = own(write_csv(tmp_path / "t.csv", rows))
    assert (found.found, found.per_class, found.broken_files) == (6, (0, 2), [])
    assert found.left_out == {
        "its text is missing": 1,
        "its label is missing": 1,
        "its label is unknown": 1,
        "it has more fields than there are columns": 1,
    }
    assert "1 of 6 records left out: its label is unknown" in caplog.text


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_a_file_that_cannot_be_read_holds_no_records(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    """Neither alone, nor beside others whose records then are used."""
    garbled = write(tmp_path / "own" / f"b.{suffix}", "").parent
    (garbled / f"b.{suffix}").write_bytes(b"\xff\x00garbled")
    with caplog.at_level(logging.ERROR):
        nothing = own(garbled)
    assert len(nothing.records) == nothing.found == 0 and nothing.broken_files == [f"b.{suffix}"]
    assert f"b.{suffix} cannot be read" in caplog.text
    assert nothing.records.batch(torch.arange(0))[1].tolist() == []
    good = garbled / f"a.{suffix}"
    if suffix == "parquet":
        parquet.write_table(pa.table({"text": ["x"], "label": ["good"]}), good)
    else:
        write(good, "text,label\nx,good\n".replace(",", "," if suffix == "csv" else "\t"))
    assert column(own(garbled).records) == ["x"]


def test_one_key_of_one_json_record_does_not_choose_the_columns(tmp_path: Path) -> None:
    lines = '{"text": "a", "label": "good"}\n{"text": "b", "label": "bad"}\n'
    more = '{"sentence1": "c", "sentence2": "d", "label": "bad", "text": "e"}\n'
    for content in (lines, lines + more):
        assert column(own(write(tmp_path / "t.jsonl", content), **NAMED).records)[:2] == ["a", "b"]
    with pytest.raises(ConfigError, match=r"^text-column: must be named for JSON lines"):
        own(tmp_path / "t.jsonl")
    with pytest.raises(ConfigError, match=r"^label-column: must be named for JSON lines"):
        own(tmp_path / "t.jsonl", text="text")
    assert len(own(write(tmp_path / "t.jsonl", ""), **NAMED).records) == 0


def test_one_value_of_a_parquet_file_costs_its_own_row(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xff\xfe", None, b"d"], pa.binary())
    spoilt = pa.StringArray.from_buffers(4, texts.buffers()[1], texts.buffers()[2], texts.buffers()[0])
    parquet.write_table(pa.table({"text": spoilt, "label": pa.array(["good", "bad", "bad", "bad"])}), tmp_path / "t.parquet")
    found = own(tmp_path / "t.parquet")
    assert column(found.records) == ["a", "d"] and rows_of(found.records).labels.tolist() == [0, 1]
    assert found.left_out == {"a value in it cannot be read": 1, "its text is missing": 1} and found.found == 4


def test_a_broken_part_of_a_parquet_file_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    table = pa.table({"text": [f"words {i}" for i in range(200)], "label": ["good", "bad"] * 100})
    parquet.write_table(table, file, row_group_size=50, compression="gzip", use_dictionary=False)
    start = parquet.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(file.read_bytes())
    content[start : start + 40] = b"\0" * 40
    file.write_bytes(content)
    found = own(file)
    assert found.left_out == {"its part of the file is broken": 50} and found.found == 200
    assert column(found.records) == [f"words {i}" for i in range(200) if not 50 <= i < 100]


def test_files_of_different_types_go_together(tmp_path: Path) -> None:
    for name, text, label in (("a", ["1"], [1]), ("b", ["2"], ["0"]), ("c", [3], [1.0])):
        parquet.write_table(pa.table({"text": text, "label": label}), tmp_path / f"{name}.parquet")
    records = own(tmp_path, labels="0,1").records
    assert column(records) == ["1", "2", "3"] and rows_of(records).labels.tolist() == [1, 0, 1]


def test_class_folders_may_be_empty_or_unknown(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    assert len(own(tmp_path, "image").records) == 0
    write_images(tmp_path, ["bad/0.png", "other/1.png"])
    found = own(tmp_path, "image")
    assert found.per_class == (0, 1) and found.left_out == {"its label is unknown": 1}


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_may_not_be_opened_is_the_owners_to_mend(tmp_path: Path, what: str) -> None:
    write_csv(tmp_path / "own" / "t.csv", [("a", "good")])
    locked = tmp_path / "own" / "t.csv" if what == "file" else tmp_path / "own"
    for above in [tmp_path, *tmp_path.parents][:3]:
        above.chmod(0o755)
    mode, root = locked.stat().st_mode, os.geteuid() == 0
    locked.chmod(0)
    try:
        if root:  # who may read all
            os.seteuid(65534)
        with pytest.raises(ConfigError, match=r"^data-path = .*: (may not be opened: Permission denied|no such file or folder)$"):
            own(tmp_path / "own")
    finally:
        if root:
            os.seteuid(0)
        locked.chmod(mode)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda folder: folder / "gone", "no such file or folder"),
        (lambda folder: folder / "*.csv", "no such file or folder"),
        (lambda folder: folder, "no table and no sub-folder of images per class"),
        (lambda folder: write(write(folder / "a.csv", "text,label\n").parent / "b.tsv", "").parent, "files; must be of one kind"),
        (lambda folder: write(folder / "a.csv", "words,label\nx,good\n"), "text-column: no column found"),
        (lambda folder: write(folder / "test.csv", "text,label\nx,good\n").parent, "split = 'train': not among test"),
    ],
    ids=["gone", "no match", "empty", "mixed", "columns", "split"],
)
def test_a_layout_that_is_wrong_is_one_line_for_the_owner(tmp_path: Path, make: Any, error: str) -> None:
    with pytest.raises(ConfigError, match=error) as raised:
        own(make(tmp_path))
    assert len(str(raised.value).splitlines()) == 1


def tokens(lengths: str) -> Any:
    """A tokenizer that spells texts as numbers of tokens and fails on exclamation marks."""

    def encode(rows: Any) -> TextRecords:
        texts = list(rows.table["text"])
        if any("!" in text for text in texts):
            raise OverflowError(lengths)
        return TextRecords([torch.tensor([int(n) for n in text.split(".")[0]]) for text in texts], rows.labels, 0)

    return encode


def test_records_that_the_model_cannot_take_are_left_out_when_they_are_read(tmp_path: Path) -> None:
    rows = [("123", "good"), ("19", "bad"), ("7!", "bad"), (".", "good"), ("8", "bad")]
    found = own(write_csv(tmp_path / "t.csv", rows), encode=tokens("x"), vocabulary=9)
    assert isinstance(found.records, TextRecords)
    assert [t.tolist() for t in found.records.tokens] == [[1, 2, 3], [8]] and found.records.labels.tolist() == [0, 1]
    assert found.left_out == {
        "the model's tokenizer fails on it": 1,
        "it holds no token, or one that the model has no embedding for": 2,
    }
    assert found.per_class == (1, 1) and found.found == 5
    assert len(own(write_csv(tmp_path / "t.csv", [("9", "good")]), encode=tokens("x"), vocabulary=9).records) == 0


def test_a_batch_that_fails_though_each_text_passes_alone_loses_none(tmp_path: Path) -> None:
    def encode(rows: Any) -> TextRecords:
        if len(rows) > 2:
            raise MemoryError
        return tokens("x")(rows)

    rows = [("123", "good"), ("19", "bad"), ("7!", "bad"), ("8", "bad")]
    found = own(write_csv(tmp_path / "t.csv", rows), encode=encode, vocabulary=9)
    assert isinstance(found.records, TextRecords)
    assert [t.tolist() for t in found.records.tokens] == [[1, 2, 3], [8]] and found.records.labels.tolist() == [0, 1]
    assert found.left_out.total() == 2 and found.per_class == (1, 1)


def test_of_a_runs_data_settings_only_the_length_of_texts_is_left() -> None:
    caps = Caps("l", 3.0, 1e-5, 10, "language", response_column="r", text_column="t", split="test")
    run = settings("language", name="file:/etc/*", response="x", text="y", split="z", site="s", answer="(a)", max_tokens=17)
    data = pinned(caps, run).data
    assert data == type(data)(name="sites", split="test", text="t", response="r", max_tokens=17)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet"])
def test_a_giant_value_costs_its_own_row(tmp_path: Path, name: str) -> None:
    """A column holds 2 GiB: one value beyond would take all of them with it."""
    texts, labels = ["a", "x" * 200, "b"], ["good", "bad", "bad"]
    file, kind = tmp_path / name, name.rpartition(".")[2]
    if kind == "parquet":
        parquet.write_table(pa.table({"text": texts, "label": labels}), file)
    elif kind == "jsonl":
        file.write_text("".join(f'{{"text": "{t}", "label": "{y}"}}\n' for t, y in zip(texts, labels, strict=True)))
    else:
        mark = "," if kind == "csv" else "\t"
        file.write_text("".join(f"{t}{mark}{y}\n" for t, y in zip(["text", *texts], ["label", *labels], strict=True)))
    found = own(file, text="text", label="label", labels="good,bad", longest=100)
    assert column(found.records) == ["a", "b"] and found.left_out.total() == 1


def test_a_table_names_no_file_outside_of_its_folder(tmp_path: Path) -> None:
    """Nor one that takes hours to resolve; and Parquet's own paths are not followed at all."""
    write_images(tmp_path / "data", ["a.png"])
    write_images(tmp_path / "other", ["b.png"])
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "other" / "b.png")
    names = ["a.png", "../other/b.png", str(tmp_path / "other" / "b.png"), "link.png", "a/" * 300_000 + "a.png"]
    write_csv(tmp_path / "data" / "t.csv", [(name, "x") for name in names], "image,label")
    found = own(tmp_path / "data" / "t.csv", "image", labels="x")
    assert (len(found.records), found.left_out.total()) == (1, 4)
    inside = pa.array([{"bytes": None, "path": str(tmp_path / "other" / "b.png")}])
    parquet.write_table(pa.table({"image": inside, "label": ["x"]}), tmp_path / "t.parquet")
    assert len(own(tmp_path / "t.parquet", "image", labels="x").records) == 0
