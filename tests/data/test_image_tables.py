"""Images for virtual sites: folders of them, and tables beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lalora_flwr.data.cleaning import Rows
from lalora_flwr.data.data_set import data_set
from lalora_flwr.data.images import ImageRecords
from tests.data.files import red, settings, write_csv, write_images


def encode(rows: Rows) -> ImageRecords:
    return ImageRecords(rows.table, rows.columns.image, rows.labels, red, "RGB")


def test_image_folders(tmp_path: Path) -> None:
    names = ["train/cat/0.png", "train/dog/1.png", "train/dog/2.png", "test/dog/3.png", "test/cat/4.png"]
    write_images(tmp_path, names)
    (tmp_path / "train" / "dog" / "2.png").write_bytes(b"garbled")
    (tmp_path / "test" / "cat" / "4.png").write_bytes(b"garbled")

    data = data_set(settings("image", name=f"file:{tmp_path}"))
    assert data.labels == ("cat", "dog") and data.classes() == [0, 1, 1]  # the unreadable one counts
    inputs, labels = data.private([2, 1, 0], encode).batch(torch.arange(3))
    assert isinstance(inputs, Tensor)
    assert (inputs.flatten().tolist(), labels.tolist()) == ([1.0, 0.0], [1, 0])  # and contributes nothing
    inputs, labels = data.public(encode).batch(torch.arange(2))
    assert isinstance(inputs, Tensor)
    assert (inputs.flatten().tolist(), labels.tolist()) == ([3.0], [1])


def test_a_table_of_paths_beside_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths start at the table's folder, wherever the process works: workers of a simulation work elsewhere."""
    write_images(tmp_path / "set", ["images/0.png", "images/1.png"])
    rows = [("images/1.png", "cat"), ("", "cat"), ("images/0.png", "dog"), ("images/gone.png", "dog")]
    write_csv(tmp_path / "set" / "train.csv", rows, names="file_name,label")
    monkeypatch.chdir("/")
    data = data_set(settings("image", name=f"file:{tmp_path / 'set'}"))
    assert data.classes() == [0, 1, 1]
    inputs, _ = data.private([0, 1, 2], encode).batch(torch.arange(3))
    assert isinstance(inputs, Tensor) and inputs.flatten().tolist() == [1.0, 0.0]
