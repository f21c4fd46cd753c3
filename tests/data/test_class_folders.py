"""Folders of images."""

from __future__ import annotations

from pathlib import Path

from datasets import DatasetDict

from lalora_flwr.data.tables import from_files
from tests.data.files import png, write, write_images


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
