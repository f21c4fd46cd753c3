"""Small sets of labelled texts, and what of them is private and public."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lalora_flwr.data.data_set import DataSet, data_set
from lalora_flwr.settings import Settings
from tests.data.files import column, keep, write_csv

GOOD, BAD = ("a fine film", "good"), ("a dull film", "bad")


def reviews(folder: Path) -> str:
    """A folder with the splits train, test and validation."""
    write_csv(folder / "reviews" / "train.csv", [GOOD, BAD, ("x", "good")])
    write_csv(folder / "reviews" / "test.csv", [("test", "bad"), ("test 2", "good")])
    write_csv(folder / "reviews" / "dev.csv", [("dev", "good")])
    return f"file:{folder / 'reviews'}"


def numbered(count: int, label: str = "{}") -> list[tuple[str, str]]:
    return [(f"text {i}", label.format(i % 3)) for i in range(count)]


def private(wanted: Settings, read: Callable[[Settings], DataSet] = data_set) -> list[Any]:
    data = read(wanted)
    return column(data.private(range(len(data.classes())), keep))


def public(wanted: Settings, name: str = "text", read: Callable[[Settings], DataSet] = data_set) -> list[Any]:
    return column(read(wanted).public(keep), name)
