"""One class, one number: names that mean the same, however they are written and wherever they come from."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lalora_flwr.data.cleaning import usable_rows
from lalora_flwr.data.columns import Columns
from lalora_flwr.data.labels import label_names, label_texts
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.tasks.single_label import SingleLabel
from tests.data.files import table

ONE = SingleLabel()
COLUMNS = Columns(text="text", label="label")
WORDS = st.sampled_from(["a", "b ", " c", "1", "2.0", "03", "-4.00", "0.5", "NA", "true"])


def typed(names: list[str], numbers: list[int]) -> Dataset:
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"text": ["x"] * len(numbers), "label": numbers}, kinds)


def test_names_of_a_type_are_understood_however_they_are_written() -> None:
    made = typed(["0.0", " good", "bad"], [0, 1, 2])
    assert label_texts(made, "label") == ["0", "good", "bad"]
    for names in (label_names(made, "label", ONE), ("0", "good", "bad"), ("0.00", "good ", "bad")):
        assert usable_rows(made, COLUMNS, names, ONE).labels.tolist() == [0, 1, 2]


@given(st.lists(WORDS, min_size=1, max_size=8, unique=True), st.data())
@hypothesis_settings(max_examples=30)
def test_a_table_is_read_with_its_own_names(names: list[str], data: st.DataObject) -> None:
    """Names and numbers of a typed column, and the same column as texts, agree record for record."""
    numbers = data.draw(st.lists(st.integers(0, len(names) - 1), min_size=1, max_size=12))
    as_type = usable_rows(made := typed(names, numbers), COLUMNS, label_names(made, "label", ONE), ONE)
    assert as_type.labels.tolist() == numbers
    as_text = usable_rows(table(text=["x"] * len(numbers), label=[names[n] for n in numbers]), COLUMNS, names, ONE)
    assert as_text.labels.tolist() == numbers
    try:
        found = label_names(as_text.table, "label", ONE)
    except ConfigError:  # texts that are scores or lists, of which a typed column makes classes all the same
        return
    assert len(found) == len(set(numbers)) and usable_rows(as_text.table, COLUMNS, found, ONE).labels.max() < len(found)


@pytest.mark.parametrize("names", [("a", "b", "a"), ("1", "1.0"), ("a", " a")])
@pytest.mark.parametrize("strict", [False, True], ids=["private", "public"])
def test_a_class_with_two_numbers_is_an_error(names: tuple[str, ...], strict: bool) -> None:
    values: dict[str, list[Any]] = {"text": ["x"], "label": ["a"]}
    with pytest.raises(ConfigError, match=rf"^data\.labels: a class occurs twice among {', '.join(names)}$"):
        usable_rows(table(**values), COLUMNS, names, ONE, strict=strict)
