"""When a data set is read: once, and again when its files were written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from lalora_flwr.data.data_set import DataSets, data_set
from lalora_flwr.data.stored_tables import StoredTables
from lalora_flwr.data.tables import from_files
from lalora_flwr.ground.errors import ConfigError
from tests.data.files import column, keep, settings, write_csv, write_images
from tests.data.reviews import BAD, GOOD, private, public, reviews


def test_the_hub() -> None:
    asked: list[tuple[str, str]] = []
    splits = {"train": [GOOD, BAD], "validation": [("v", "bad")]}

    def load(name: str, split: str) -> Dataset | None:
        asked.append((name, split))
        if split not in splits:
            return None
        return Dataset.from_dict({"text": [t for t, _ in splits[split]], "label": [x for _, x in splits[split]]})

    read = DataSets(stored=lambda data: StoredTables(data, read_hub=load))
    wanted = settings(name="hub:owner/set@v1")
    assert private(wanted, read) == ["a fine film", "a dull film"] and public(wanted, read=read) == ["v"]
    assert asked == [("owner/set@v1", split) for split in ("train", "test", "validation")]
    with pytest.raises(ConfigError, match=r"^data\.split = 'extra': hub:owner/set@v1 has no such split$"):
        read(settings(name="hub:owner/set@v1", split="extra"))


def test_a_data_set_is_read_once(tmp_path: Path) -> None:
    reads: list[str] = []

    def files(key: str, path: str) -> DatasetDict:
        reads.append(key)
        return from_files(key, path)

    read = DataSets(stored=lambda data: StoredTables(data, read_files=files))
    wanted = settings(name=reviews(tmp_path))
    assert read(wanted) is read(settings(name=wanted.data.name))
    public(wanted, read=read), private(wanted, read)
    assert reads == ["data.name"]


def test_a_process_reads_its_data_set_once(tmp_path: Path) -> None:
    wanted = settings(name=reviews(tmp_path))
    assert data_set(wanted) is data_set(settings(name=wanted.data.name))


def test_a_file_that_was_written_since_is_read_again(tmp_path: Path) -> None:
    file, test = tmp_path / "own.csv", tmp_path / "test.csv"
    wanted = settings(name=f"file:{write_csv(file, [GOOD, BAD])}", test=f"file:{write_csv(test, [GOOD])}")
    read = DataSets()
    before = read(wanted)
    times = file.stat()
    write_csv(file, [("a poor film", "good"), BAD])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as some copies keep them
    assert private(wanted, read) == ["a poor film", "a dull film"] == private(wanted, DataSets())
    write_csv(test, [BAD])
    assert public(wanted, read=read) == ["a dull film"] and read(wanted) is not before


def test_a_file_that_came_or_went_since_changes_the_data_set(tmp_path: Path) -> None:
    wanted, read = settings(name=reviews(tmp_path)), DataSets()
    assert public(wanted, read=read) == ["test", "test 2"]
    write_csv(tmp_path / "reviews" / "train-2.csv", [("y", "bad")])
    assert sorted(private(wanted, read)) == ["a dull film", "a fine film", "x", "y"]
    (tmp_path / "reviews" / "test.csv").unlink()
    assert public(wanted, read=read) == ["dev"]


def test_an_image_that_came_since_changes_the_data_set(tmp_path: Path) -> None:
    read, wanted = DataSets(), settings("image", name=f"file:{write_images(tmp_path, ['cat/0.png', 'dog/1.png'])}")
    assert read(wanted).classes() == [0, 1]
    write_images(tmp_path, ["cat/2.png"])
    assert read(wanted).classes() == [0, 0, 1]
    write_images(tmp_path, ["bee/3.png"])
    assert read(wanted).labels == ("bee", "cat", "dog")


def test_only_the_last_data_sets_are_kept(tmp_path: Path) -> None:
    wanted = [settings(name=f"file:{write_csv(tmp_path / f'{i}.csv', [GOOD, BAD])}") for i in range(3)]
    read = DataSets(size=2)
    first, second = read(wanted[0]), read(wanted[1])
    assert read(wanted[0]) is first and read(wanted[2]) is not None
    assert read(wanted[0]) is first and read(wanted[1]) is not second
    assert column(first.private([0], keep)) == ["a fine film"]
