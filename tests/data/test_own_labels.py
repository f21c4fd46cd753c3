"""A real site's records whose labels are several classes or numbers: each row by itself, as the owner declares them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from lalora_flwr.data.own_records import OwnRecords, own_records
from lalora_flwr.ground.errors import ConfigError
from tests.data.files import keep, rows_of, settings, write, write_csv

SEVERAL: dict[str, Any] = {"name": "sites", "test": "file:public.csv", "labels": "good,long", "problem_type": "multi-label"}
NUMBERS: dict[str, Any] = {"name": "sites", "test": "file:public.csv", "problem_type": "regression", "label_range": "0,10"}
WANTED = [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]


def own(path: Path, **about: Any) -> OwnRecords:
    return own_records(settings("text", **about), str(path), keep)


def as_lists(folder: Path) -> Path:
    labels: list[Any] = [["good"], [], ["long", "good"], ["cough"], None, ["good", "good"], 3]
    rows = [{"text": str(i), "label": label} for i, label in enumerate(labels)]
    return write(folder / "own.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def separated(folder: Path) -> Path:
    values = ["good", "[]", "long|good", "cough", "", "good|good", "good|"]
    return write_csv(folder / "own.csv", [(str(i), value) for i, value in enumerate(values)])


def typed(folder: Path) -> Path:
    kinds = Features({"text": Value("string"), "label": List(ClassLabel(names=["long", "good", "cough"]))})
    rows = {"text": [str(i) for i in range(6)], "label": [[1], [], [0, 1], [2], None, [1, 1]]}
    Dataset.from_dict(rows, kinds).to_parquet(folder / "own.parquet")
    return folder / "own.parquet"


def by_column(folder: Path) -> Path:
    rows = [("0", "1", "0"), ("1", "0", "0.0"), ("2", "true", "1.0"), ("3", "-1", "0"), ("4", "", "1"), ("5", "2", "1")]
    return write_csv(folder / "own.csv", rows, names="text,good,long")


def typed_by_column(folder: Path) -> Path:
    columns = {"text": ["0", "1", "2", "3"], "good": [1.0, 0.0, 1.0, None], "long": [False, False, True, True]}
    Dataset.from_dict(columns).to_parquet(folder / "own.parquet")
    return folder / "own.parquet"


def json_by_column(folder: Path) -> Path:
    rows = [{"text": "0", "good": 1, "long": 0}, {"text": "1", "good": False, "long": 0}, {"text": "2", "good": 1, "long": True}]
    return write(folder / "own.jsonl", "".join(json.dumps(row) + "\n" for row in [*rows, {"text": "3", "good": 1}]))


@pytest.mark.parametrize("make", [as_lists, separated, typed])
def test_several_classes_in_one_column(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    found = own(make(tmp_path), text="text", label="label", **SEVERAL)
    rows = rows_of(found.records)
    assert rows.labels.tolist() == WANTED and list(rows.table["text"]) == ["0", "1", "2"]
    assert found.per_class == (2, 1) and found.left_out["its label is missing"] == 1
    assert found.left_out["its label is unknown"] >= 2 and found.unknown_labels["cough"] == 1


@pytest.mark.parametrize("make", [by_column, typed_by_column, json_by_column])
def test_several_classes_in_a_column_each(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    found = own(make(tmp_path), text="text", **SEVERAL)
    rows = rows_of(found.records)
    assert rows.labels.tolist() == WANTED and list(rows.table["text"]) == ["0", "1", "2"]
    assert found.per_class == (2, 1) and found.left_out["its label is missing"] == 1


def test_a_column_each_is_for_all_classes_or_none(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "own.csv", [("0", "1")], names="text,good")
    with pytest.raises(
        ConfigError,
        match=r"^label-column: no column found; name one of text, good; or all of labels must be columns, and 'long' is none$",
    ):
        own(path, text="text", **SEVERAL)


def test_numbers_within_the_owners_range(tmp_path: Path) -> None:
    values = ["0", "10.0", "2.5", "5e0", "-0.1", "11", "nan", "good", "", "3,5"]
    rows = [{"text": str(i), "label": value} for i, value in enumerate([*values[:3], 5, *values[4:]])]
    for path in (
        write(tmp_path / "own.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
        write_csv(tmp_path / "own.csv", [(str(i), f'"{value}"') for i, value in enumerate(values)]),
    ):
        found = own(path, text="text", label="label", **NUMBERS)
        assert rows_of(found.records).labels.tolist() == [-1.0, 1.0, -0.5, 0.0] and found.per_class == ()
        assert found.left_out == {"its label is missing": 1, "its number is none, or beyond the range": 5}
        assert found.unknown_labels.total() == 5 and found.unknown_labels["11"] == 1


@pytest.mark.parametrize("about", [SEVERAL, NUMBERS])
def test_a_site_without_records_has_none(about: dict[str, Any], tmp_path: Path) -> None:
    records = own(write_csv(tmp_path / "own.csv", [], names="text,label"), text="text", label="label", **about).records
    assert not len(records) and rows_of(records).labels.shape[0] == 0
