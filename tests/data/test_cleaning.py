"""Rows that a task can use: labels as numbers, and what is left out."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value

from lalora_flwr.data import cleaning
from lalora_flwr.data.cleaning import Rows
from lalora_flwr.data.columns import Columns
from lalora_flwr.data.labels import label_names, label_texts
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.tasks.single_label import SingleLabel
from tests.data.files import png, table

TEXT = Columns(text="text", label="label")
LABELS = ("bad", "good")
ONE = SingleLabel()
MISSING = [None, "", "  ", "\n"]


def usable_rows(rows: Dataset, columns: Columns, labels: tuple[str, ...], **more: Any) -> Rows:
    return cleaning.usable_rows(rows, columns, labels, ONE, **more)


def typed(kind: Any, **columns: list[Any]) -> Dataset:
    return Dataset.from_dict(columns, Features({name: kind if name == "label" else Value("string") for name in columns}))


def test_label_names_are_those_of_the_type() -> None:
    kinds = typed(ClassLabel(names=["z", "a", "never"]), label=[0, 1, None, -1])
    assert label_names(kinds, "label", ONE) == ("z", "a", "never")
    assert label_texts(kinds, "label") == ["z", "a", None, None]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["b", "a", "b", None, " ", "c"], ("a", "b", "c")),
        (["10", "9", "-1"], ("-1", "9", "10")),
        ([10, 9, -1, None], ("-1", "9", "10")),
        ([1.0, 10.0, None, 2.0, math.nan], ("1", "2", "10")),
        (["1.0", "1", "10.00"], ("1", "10")),
        (["TRUE", "true", "False"], ("false", "true")),
        (["caf\u00e9", "cafe\u0301"], ("caf\u00e9",)),
        ([True, False], ("false", "true")),
        (["NA", "null", "nan", "None"], ("NA", "None", "nan", "null")),
        (["10", "9", "x"], ("10", "9", "x")),
        ([" x", "x "], ("x",)),
    ],
)
def test_else_label_names_are_the_values_in_order(values: list[Any], names: tuple[str, ...]) -> None:
    assert label_names(table(label=values), "label", ONE) == names


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.5, 10.5, 9.5], "numbers such as 0.5, which are no classes"),
        (["1", "2.50"], "numbers such as 2.50"),
        (["1e-3", "2"], "numbers such as 1e-3"),
        (['["a", "b"]', '["c"]'], "lists such as"),
        (['{"a": 1}'], "lists such as"),
        ([f"id-{i}" for i in range(21)], "21 values in 21 records"),
        ([f"id-{i}" for i in range(31)] + ["id-0"] * 29, "31 values in 60 records"),
    ],
)
def test_scores_lists_and_ids_are_no_classes(values: list[Any], said: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\.label: column 'label' holds ") as refused:
        label_names(table(label=values), "label", ONE)
    assert said in str(refused.value) and str(refused.value).endswith("or the classes in data.labels")


@pytest.mark.parametrize("values", [[f"c{i}" for i in range(20)], [f"c{i}" for i in range(30)] * 2, ["[a]", "b", "1.5.2"]])
def test_few_records_or_odd_names_are_classes(values: list[Any]) -> None:
    assert set(label_names(table(label=values), "label", ONE)) == set(values)


def test_labels_become_the_numbers_of_the_names() -> None:
    rows = usable_rows(table(text=["a", "b", "c"], label=["good", " bad", "good "]), TEXT, LABELS)
    assert rows.labels.tolist() == [1, 0, 1] and rows.labels.dtype == torch.int64
    assert list(rows.table["text"]) == ["a", "b", "c"]


def test_numbers_are_the_same_however_they_are_written() -> None:
    for values in ([1, 0], [1.0, 0.0], ["1", "0"], ["1.0", "0.00"]):
        for names in (("0", "1"), ("0.0", "1.0")):
            assert usable_rows(table(text=["a", "b"], label=values), TEXT, names).labels.tolist() == [1, 0]


def test_a_site_that_lacks_a_class_has_the_same_numbers() -> None:
    assert usable_rows(table(text=["a"], label=["good"]), TEXT, LABELS).labels.tolist() == [1]
    other = typed(ClassLabel(names=["good"]), text=["a"], label=[0])
    assert usable_rows(other, TEXT, LABELS).labels.tolist() == [1]


@pytest.mark.parametrize("strict", [False, True], ids=["private", "public"])
@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("name", ["text", "other", "label"])
def test_a_missing_or_blank_value_is_left_out(name: str, missing: str | None, strict: bool) -> None:
    values = {"text": ["a", "b", "c"], "other": ["d", "e", "f"], "label": ["good", "bad", "good"]}
    values[name][1] = missing  # type: ignore[call-overload]
    rows = usable_rows(table(**values), Columns(text="text", text_pair="other", label="label"), LABELS, strict=strict)
    assert list(rows.table["text"]) == ["a", "c"] and rows.labels.tolist() == [1, 1]


@pytest.mark.parametrize("missing", MISSING)
def test_of_a_prompt_only_the_second_part_may_be_missing(missing: str | None) -> None:
    columns = Columns(text="text", text_pair="more", response="answer")
    rows = usable_rows(
        table(text=["a", missing, "c", "d"], more=["e", "f", missing, "g"], answer=["h", "i", "j", missing]), columns, ()
    )
    assert list(rows.table["text"]) == ["a", "c"] and rows.labels.tolist() == [0, 0]


def test_numbers_are_answers_and_not_a_number_is_missing() -> None:
    rows = usable_rows(table(text=["a", "b", "c"], answer=[0.0, math.nan, 2.0]), Columns(text="text", response="answer"), ())
    assert list(rows.table["answer"]) == [0.0, 2.0]


@pytest.mark.parametrize("word", ["NA", "null", "nan", "None", "N/A"])
def test_words_for_nothing_are_text(word: str) -> None:
    rows = usable_rows(table(text=[word], label=[word]), TEXT, (word,))
    assert list(rows.table["text"]) == [word] and rows.labels.tolist() == [0]


def test_an_unknown_label_is_left_out_of_private_records_and_an_error_in_public_ones() -> None:
    some = table(text=["a", "b", "c"], label=["good", "fair", "bad"])
    assert list(usable_rows(some, TEXT, LABELS).table["text"]) == ["a", "c"]
    with pytest.raises(ConfigError, match=r"^data\.test: label 'fair' is not among bad, good; see data\.labels$"):
        usable_rows(some, TEXT, LABELS, strict=True)


def test_a_number_beyond_the_names_of_the_type_is_an_unknown_label() -> None:
    broken = typed(Value("int64"), text=["a", "b"], label=[0, 7])
    broken.info.features["label"] = ClassLabel(names=["good"])  # as a file may say that was written with another list
    assert usable_rows(broken, TEXT, LABELS).labels.tolist() == [1]
    with pytest.raises(ConfigError, match="label '7' is not among"):
        usable_rows(broken, TEXT, LABELS, strict=True)


def test_no_record_at_all_is_an_error_in_public_ones_only() -> None:
    none = table(text=["", " "], label=["good", "bad"])
    assert len(usable_rows(none, TEXT, LABELS)) == 0
    with pytest.raises(ConfigError, match=r"^data\.test: no usable row"):
        usable_rows(none, TEXT, LABELS, strict=True)


def test_hidden_labels_of_a_test_split_are_missing() -> None:
    hidden = typed(ClassLabel(names=list(LABELS)), text=["a", "b"], label=[-1, -1])
    with pytest.raises(ConfigError, match=r"its labels are hidden .*split:validation"):
        usable_rows(hidden, TEXT, LABELS, strict=True)


def test_a_record_is_judged_by_itself_alone() -> None:
    texts, labels = ["a", "", "c", "d", "e"], ["good", "bad", "fair", None, "bad"]
    kept = [len(usable_rows(table(text=[t], label=[x]), TEXT, LABELS)) for t, x in zip(texts, labels, strict=True)]
    together = usable_rows(table(text=texts, label=labels), TEXT, LABELS)
    assert list(together.table["text"]) == [t for t, k in zip(texts, kept, strict=True) if k] == ["a", "e"]


def test_how_many_were_left_out_goes_to_the_sites_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        usable_rows(table(text=["secret", "b", "c"], label=["other", None, "good"]), TEXT, LABELS)
        usable_rows(table(text=["c"], label=["good"]), TEXT, LABELS)
    assert {record.name for record in caplog.records} == {"lalora_flwr.site"}
    said = [record.getMessage() for record in caplog.records]
    assert said == ["1 of 3 rows left out: its label is unknown", "1 of 3 rows left out: its label is missing"]
    assert "secret" not in caplog.text and "other" not in caplog.text


def test_a_record_of_no_site_is_nobodys() -> None:
    columns = Columns(text="text", label="label", site="ward")
    rows = usable_rows(table(text=["a", "b"], label=["good", "good"], ward=[None, "x"]), columns, LABELS)
    assert list(rows.table["text"]) == ["b"]


STRUCT = {"bytes": Value("binary"), "path": Value("string")}


def image_rows(kind: Any, values: list[Any], folder: Path | None = None) -> list[Any]:
    stored = STRUCT if isinstance(kind, Image) else kind
    made = Dataset.from_dict({"image": values, "label": ["good"] * len(values)}, Features(image=stored, label=Value("string")))
    made = made.cast(Features(image=kind, label=Value("string")))
    rows = usable_rows(made, Columns(image="image", label="label"), LABELS, folder=folder)
    return list(rows.table.cast_column("image", Image(decode=False))["image"])


def test_a_missing_image_is_left_out_and_an_unreadable_one_counts() -> None:
    values = [{"bytes": png(1), "path": None}, None, {"bytes": b"garbled", "path": None}, {"bytes": None, "path": None}]
    for kind in (Image(), STRUCT):
        assert [image["bytes"] for image in image_rows(kind, values)] == [png(1), b"garbled"]
    assert [image["bytes"] for image in image_rows(Value("binary"), [png(1), None, b"garbled"])] == [png(1), b"garbled"]


def test_a_blank_path_is_no_image_and_a_relative_one_starts_at_the_folder(tmp_path: Path) -> None:
    values = ["a/1.png", None, "", "  ", f"{tmp_path}/2.png", "gone.png"]
    paths = [image["path"] for image in image_rows(Value("string"), values, Path("/folder"))]
    assert paths == ["/folder/a/1.png", f"{tmp_path}/2.png", "/folder/gone.png"]
    assert [image["path"] for image in image_rows(Value("string"), values)] == ["a/1.png", f"{tmp_path}/2.png", "gone.png"]


def test_taken_rows_keep_their_labels() -> None:
    rows = usable_rows(table(text=list("abcd"), label=["good", "", "bad", "good"]), TEXT, LABELS).take([2, 0])
    assert list(rows.table["text"]) == ["d", "a"] and rows.labels.tolist() == [1, 1] and len(rows) == 2
    again = usable_rows(rows.table, TEXT, LABELS)
    assert list(again.table["text"]) == ["d", "a"] and again.labels.tolist() == [1, 1]
    assert len(rows.take([])) == 0
