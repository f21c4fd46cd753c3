"""A simulation's data sets whose records have several classes, or numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value

from lalora_flwr.data.data_set import DataSets, Facts, data_set, facts, private_records
from lalora_flwr.data.holdings import holdings
from lalora_flwr.data.named import NamedDataSet
from lalora_flwr.data.partition import site_rows
from lalora_flwr.data.records import Records
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.settings import Settings
from lalora_flwr.settings.choices import DATASETS
from lalora_flwr.tasks.multi_label import MultiLabel
from lalora_flwr.tasks.regression import Regression
from tests.conftest import small
from tests.data.files import keep, rows_of, settings, write_csv

SEVERAL: dict[str, Any] = {"problem_type": "multi-label", "test": "hold-out:0.25"}
NUMBERS: dict[str, Any] = {"problem_type": "regression", "label_range": "0,8", "test": "hold-out:0.25"}


def table(folder: Path, labels: list[str], name: str = "t.csv") -> str:
    return f"file:{write_csv(folder / name, [(f'text {i}', label) for i, label in enumerate(labels)])}"


def test_classes_that_occur_are_found_and_nothing_is_sorted_by_them(tmp_path: Path) -> None:
    wanted = settings(name=table(tmp_path, ["b|a", "c", "a", "[]"] * 2), **SEVERAL)
    assert facts(wanted) == Facts("text", ("a", "b", "c"), problem=MultiLabel())
    data = data_set(wanted)
    assert list(data.classes()) == [0] * 6
    targets = rows_of(data.private(range(6), keep)).labels
    assert targets.shape == (6, 3) and targets.dtype == torch.float32 and rows_of(data.public(keep)).labels.shape == (2, 3)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["a, b|c", "c", "a, b", "d|c"], ("a, b", "c", "d")),  # one separator, and a name with a comma in it
        (["a, b", "c", "[]", '["d, e"]'], ("a", "b", "c", "d, e")),
        (["a; b", "b", "a;c", "c"], ("a", "b", "c")),
        (["a; b, c", "b, c", "a", "a;b"], ("a", "b", "b, c")),
    ],
)
def test_a_column_has_one_separator(labels: list[str], classes: tuple[str, ...], tmp_path: Path) -> None:
    fields = ['"' + label.replace('"', '""') + '"' for label in labels * 2]
    data = data_set(settings(name=table(tmp_path, fields), **SEVERAL))
    assert data.labels == classes and len(data.classes()) == 6


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["a|b", "c", "a,b"], "'a,b', which may be one class or several, as others have | between theirs"),
        (["a,b", "c", "a;b"], "'a,b', which may be one class or several, as others have ; between theirs"),
    ],
)
def test_two_separators_in_one_column_invent_no_classes(labels: list[str], says: str, tmp_path: Path) -> None:
    name = table(tmp_path, [f'"{label}"' for label in labels * 2])
    with pytest.raises(ConfigError) as refused:
        data_set(settings(name=name, **SEVERAL))
    assert str(refused.value) == f"data.label: column 'label' holds {says}; name the classes in data.labels"
    assert len(data_set(settings(name=name, labels="a,b,c", **SEVERAL)).classes()) == 4  # then each field has its own


def test_names_of_a_type_stand_also_for_lists(tmp_path: Path) -> None:
    kinds = Features({"text": Value("string"), "label": List(ClassLabel(names=["never", "b", "a"]))})
    Dataset.from_dict({"text": list("wxyz"), "label": [[1], [1, 2], [], [2]]}, kinds).to_parquet(tmp_path / "t.parquet")
    data = data_set(settings(name=f"file:{tmp_path / 't.parquet'}", **SEVERAL))
    assert data.labels == ("never", "b", "a") and rows_of(data.private(range(3), keep)).labels.shape == (3, 3)


def test_classes_of_tokens_are_refused_by_name(tmp_path: Path) -> None:
    kinds = Features({"text": Value("string"), "label": List(ClassLabel(names=["O", "B-PER"]))})
    Dataset.from_dict({"text": ["x", "y"], "label": [[0, 0, 1], [0, 1]]}, kinds).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(
        ConfigError, match=r"^data\.label: column 'label' holds a class twice .*classes of tokens are not supported"
    ):
        data_set(settings(name=f"file:{tmp_path / 't.parquet'}", **SEVERAL))
    with pytest.raises(
        ConfigError, match="lists: several classes of one record need problem-type multi-label; classes of tokens"
    ):
        data_set(settings(name=f"file:{tmp_path / 't.parquet'}"))


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("a|b|", "holds an empty name among several"),
        ("['a', 'b']", r"holds lists such as \['a' \(write lists as JSON, or separate the classes by \|\)"),
        ("{'n': 'a'}", r"holds lists such as \{'n': 'a'\}"),
        ("[1, 0, 1]", "holds a class twice .* or each class its 0 or 1"),
    ],
)
def test_what_is_no_list_of_classes_makes_no_classes(label: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^data.label: column 'label' {says}"):
        data_set(settings(name=table(tmp_path, [f'"{label}"'] * 4), **SEVERAL))


def test_declared_names_may_begin_like_a_list(tmp_path: Path) -> None:
    data = data_set(settings(name=table(tmp_path, ["[other]|b", "b", "[other]", "b"]), labels="[other],b", **SEVERAL))
    assert len(data.classes()) == 3


@pytest.mark.parametrize(
    ("label", "about", "says"),
    [
        ("a|cough", {**SEVERAL, "labels": "a,b"}, "is a list with a class that is not among a, b; see data.labels"),
        ("a|a", {**SEVERAL, "labels": "a,b"}, "is a class twice in one record, as where each token has one"),
        ("9", NUMBERS, "is no number from 0 to 8; see data.label and data.label-range"),
        ("high", NUMBERS, "is no number from 0 to 8"),
    ],
)
def test_an_odd_label_of_public_records_is_an_error(label: str, about: dict[str, Any], says: str, tmp_path: Path) -> None:
    good = "a" if about.get("labels") else "3"
    name, test = table(tmp_path, [good] * 4), table(tmp_path, [good, label], "test.csv")
    with pytest.raises(ConfigError) as refused:
        data_set(settings(name=name, **{**about, "test": test})).public(keep)
    assert says in str(refused.value) and str(refused.value).startswith("data.test: label ")


def test_several_odd_numbers_are_counted_and_three_are_shown(tmp_path: Path) -> None:
    name, test = table(tmp_path, ["3"] * 4), table(tmp_path, ["3", "9", "high", "9", "-1", "11"], "test.csv")
    with pytest.raises(ConfigError) as refused:
        data_set(settings(name=name, **{**NUMBERS, "test": test})).public(keep)
    said = "'-1' is no number from 0 to 8; see data.label and data.label-range (5 records have such, among them '-1', '11', '9')"
    assert str(refused.value) == f"data.test: label {said}"


def test_hidden_numbers_of_a_test_split_are_missing_unless_they_lie_in_the_range(tmp_path: Path) -> None:
    name, test = table(tmp_path, ["3"] * 4), table(tmp_path, ["-1", "-1"], "test.csv")
    with pytest.raises(ConfigError, match="its labels are hidden"):
        data_set(settings(name=name, **{**NUMBERS, "test": test})).public(keep)
    public = data_set(settings(name=name, **{**NUMBERS, "test": test, "label_range": "-2,8"})).public(keep)
    assert len(public) == 2


def test_ends_of_the_range_are_kept_in_a_column_of_float32(tmp_path: Path) -> None:
    kinds = Features({"text": Value("string"), "label": Value("float32")})
    rows = {"text": list("vwxyz"), "label": [0.1, 0.05, 0.0, 0.2, -1.0]}
    Dataset.from_dict(rows, kinds).to_parquet(tmp_path / "t.parquet")
    wanted = settings(name=f"file:{tmp_path / 't.parquet'}", **{**NUMBERS, "label_range": "0,0.1", "test": "hold-out:0.4"})
    assert len(data_set(wanted).classes()) == 2 and len(data_set(wanted).public(keep)) == 1


def test_numbers_need_no_names_and_can_be_sorted_into_shards(tmp_path: Path) -> None:
    values = [i % 8 + 0.5 * (i % 2) for i in range(64)]
    wanted = settings(name=table(tmp_path, [str(value) for value in values]), partition="shards", **NUMBERS)
    assert facts(wanted) == Facts("text", (), problem=Regression(0.0, 8.0)) and facts(wanted).outputs == 1
    data = data_set(wanted)
    assert private_records(wanted) == 48 and data.labels == ()
    rows = site_rows(data.classes(), wanted.data, 1, 4, None)
    spans = [max(own) - min(own) for own in ([data.classes()[row] for row in part] for part in rows)]
    assert min(spans) < 2.0 and holdings(wanted).labels == ("",) and sum(holdings(wanted).records()) == 48


@pytest.mark.parametrize("about", [SEVERAL, NUMBERS])
def test_declared_facts_need_no_data(about: dict[str, Any]) -> None:
    named = {"labels": "a,b"} if about is SEVERAL else {}
    wanted = settings(name="file:none.csv", records=50, **named, **about)
    assert facts(wanted).outputs == (2 if named else 1) and private_records(wanted) == 50


def scans(kind: str, labels: torch.Tensor) -> NamedDataSet:
    def read() -> Records:
        return Records(torch.zeros(len(labels), 1, 8, 8), labels)

    names, bounds = (("a", "b"), "") if kind == "multi-label" else ((), "0,8")
    about: dict[str, Any] = {"input_shape": (1, 8, 8), "problem_type": kind, "label_range": bounds}
    return NamedDataSet("image", names, len(labels), "none", read, lambda: read(), **about)


@pytest.mark.parametrize(
    ("kind", "labels", "says"),
    [
        ("multi-label", torch.tensor([[1.0, 0.0], [0.0, 0.0]]), ""),
        ("multi-label", torch.tensor([[1.0, 0.5], [0.0, 0.0]]), "must be 0 or 1 of shape"),
        ("multi-label", torch.tensor([1, 0]), "must be 0 or 1 of shape"),
        ("regression", torch.tensor([-1.0, 0.5]), ""),
        ("regression", torch.tensor([-1.0, 8.0]), "no numbers from -1 to 1"),
    ],
)
def test_a_data_set_of_tensors_has_the_labels_that_it_declares(
    kind: str, labels: torch.Tensor, says: str, tmp_path: Path
) -> None:
    name = f"scans-{kind}-{labels.shape}-{float(labels.sum())}"  # a name is taken once and for all
    DATASETS.register(name, scans(kind, labels))
    bounds = "0,8" if kind == "regression" else ""
    about: dict[str, Any] = {"data__name": name, "data__problem_type": kind, "data__label_range": bounds, "model__name": "timm/x"}
    about["num_supernodes"] = 2
    wanted: Settings = small(tmp_path, **about)
    assert facts(wanted).outputs == (2 if kind == "multi-label" else 1)
    with pytest.raises(ConfigError, match=r"^data\.(problem-type|label-range) = "):
        small(tmp_path, **{**about, "data__problem_type": "single-label", "data__label_range": ""})
    if says:
        with pytest.raises(ConfigError, match=says):
            DataSets()(wanted).classes()
    else:
        assert len(DataSets()(wanted).classes()) == 2
