"""Parquet as others write it: several files, old and new types, images as bytes, paths or both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from lalora_flwr.data.images import ImageRecords
from lalora_flwr.data.own_records import own_records
from lalora_flwr.data.tables import from_files
from lalora_flwr.ground.errors import ConfigError
from tests.data.files import keep, png, red, rows_of, settings, write_images

SITES: dict[str, Any] = {"name": "sites", "test": "file:public.csv", "labels": "x,y"}


def save(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    "second",
    [
        {"n": pa.array([None, 2.0], pa.float64())},  # pandas makes whole numbers with a gap so
        {"n": pa.array([None, None], pa.null())},
        {"n": pa.array([None, 2], pa.int8())},
        {},
    ],
    ids=["float", "null", "small", "no column"],
)
def test_files_with_gaps_go_together(tmp_path: Path, second: dict[str, pa.Array]) -> None:
    save(tmp_path / "own" / "a.parquet", text=["a"], n=[1])
    save(tmp_path / "own" / "b.parquet", **{"text": ["b", "c"], **second})
    table = from_files("k", str(tmp_path / "own"))["train"]
    last = 2 if len(second) and second["n"].null_count == 1 else None
    assert table[:] == {"text": ["a", "b", "c"], "n": [1, None, last]} and table.features["n"].dtype == "int64"


def test_files_that_cannot_go_together_are_one_line(tmp_path: Path) -> None:
    save(tmp_path / "own" / "a.parquet", text=["a"], n=[1])
    save(tmp_path / "own" / "b.parquet", text=["b"], n=["many"])
    with pytest.raises(ConfigError, match=r"^k = .*: cannot be read: .+$"):
        from_files("k", str(tmp_path / "own"))


def test_splits_may_differ_in_their_columns(tmp_path: Path) -> None:
    save(tmp_path / "own" / "train.parquet", text=["a"], label=["x"], note=["n"])
    save(tmp_path / "own" / "test.parquet", text=["b"], label=[1])
    splits = from_files("k", str(tmp_path / "own"))
    assert splits["train"][:] == {"text": ["a"], "label": ["x"], "note": ["n"]}
    assert splits["test"][:] == {"text": ["b"], "label": [1]}


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_texts_and_labels_of_every_type(tmp_path: Path, kind: pa.DataType) -> None:
    file = save(tmp_path / "t.parquet", text=pa.array(["a", None, "b", " "], pa.string()).cast(kind), label=["x", "x", "y", "y"])
    rows = rows_of(own_records(settings(**SITES), str(file), keep).records)
    assert list(rows.table["text"]) == ["a", "b"] and rows.labels.tolist() == [0, 1]
    file = save(tmp_path / "u.parquet", text=["a", "b", "c"], label=pa.array(["y", None, "x"], pa.string()).cast(kind))
    assert rows_of(own_records(settings(**SITES), str(file), keep).records).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("images", "read"),
    [
        (pa.array([png(3), None, b"x"], pa.binary()), [3]),
        (pa.array([png(3), None, b"x"], pa.large_binary()), [3]),
        (pa.array([{"bytes": png(3)}, {"bytes": None}, {"bytes": b"x"}]), [3]),
        (pa.array([{"bytes": png(3), "path": "a.png"}, None, {"bytes": b"x", "path": None}]), [3]),
        (pa.array(["images/0.png", None, "gone.png"], pa.string()), [0]),
        (pa.array(["images/0.png", "", "gone.png"], pa.large_string()), [0]),
        (pa.array([" images/0.png", " ", "gone.png"], pa.string_view()), [0]),
    ],
    ids=["bytes", "large bytes", "struct of bytes", "struct", "paths", "large paths", "views of paths"],
)
def test_images_of_every_type(tmp_path: Path, images: pa.Array, read: list[float]) -> None:
    """The second is missing and left out; the third cannot be read and counts."""
    write_images(tmp_path, ["images/0.png"])
    file = save(tmp_path / "t.parquet", image=images, label=["y", "x", "x"])
    records = own_records(
        settings("image", **SITES), str(file), lambda r: ImageRecords(r.table, r.columns.image, r.labels, red, "RGB")
    ).records
    inputs, labels = records.batch(torch.arange(2))
    assert len(records) == 2 and inputs.flatten().tolist() == read and labels.tolist() == [1]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("values", "holds"),
    [
        (pa.array([b"a"]), "bytes, not text"),
        (pa.array([["a", "b"]]), "values of type List, not text"),
        (pa.array([{"role": "user"}]), "values of type dict, not text"),
    ],
    ids=["bytes", "lists", "structs"],
)
@pytest.mark.parametrize("key", ["text", "text-pair", "label"])
def test_what_is_no_text_is_not_read_as_python_spells_it(tmp_path: Path, values: pa.Array, holds: str, key: str) -> None:
    columns: dict[str, Any] = {"sentence1": ["a"], "sentence2": ["b"], "label": ["x"]}
    wrong = {"text": "sentence1", "text-pair": "sentence2", "label": "label"}[key]
    file = save(tmp_path / "t.parquet", **{**columns, wrong: values})
    if key == "label" and "List" in holds:
        holds = "lists: several classes of one record need problem-type multi-label; classes of tokens are not supported"
    with pytest.raises(ConfigError, match=rf"^{key}-column: column '{wrong}' holds {holds}; name another one of sentence1, "):
        own_records(settings(**SITES), str(file), keep)


def test_what_is_no_image_is_no_image(tmp_path: Path) -> None:
    file = save(tmp_path / "t.parquet", image=pa.array([{"width": 3}]), label=["x"])
    with pytest.raises(ConfigError, match=r"^image-column: column 'image' holds values with neither bytes nor path; name "):
        own_records(settings("image", **SITES), str(file), keep)
