"""Which column is what."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Features, Image, List, Value

from lalora_flwr.data.columns import IMAGE_NAMES, LABEL_NAMES, PAIRS, TEXT_NAMES, Columns, find_columns
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.settings import DataSettings

KIND = ClassLabel(names=["a", "b"])


def found(task: str, *names: str, typed: dict[str, object] | None = None, shared: bool = False, **settings: str) -> Columns:
    features = Features({**{name: Value("string") for name in names}, **(typed or {})})
    return find_columns(features, DataSettings(**settings), task, shared=shared)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_a_text_is_found_by_its_name(name: str) -> None:
    assert found("text", "id", name, "label") == Columns(text=name, label="label")


@pytest.mark.parametrize(("first", "second"), PAIRS.items())
def test_a_second_text_is_found_by_its_name(first: str, second: str) -> None:
    assert found("text", second, first, "label") == Columns(text=first, text_pair=second, label="label")
    assert found("text", second, first, "label", text_pair="none") == Columns(text=first, label="label")


@pytest.mark.parametrize("name", LABEL_NAMES)
def test_a_label_is_found_by_its_name(name: str) -> None:
    assert found("text", name, "text").label == name


@pytest.mark.parametrize("name", IMAGE_NAMES)
def test_an_image_is_found_by_its_name(name: str) -> None:
    assert found("image", "id", name, "label") == Columns(image=name, label="label")


def test_a_type_says_more_than_a_name() -> None:
    assert found("image", "image", "label", typed={"scan": Image(), "kind": KIND}) == Columns(image="scan", label="kind")


def test_of_several_images_or_classes_the_name_decides() -> None:
    typed = {"mask": Image(), "image": Image(), "coarse_label": KIND, "fine_label": KIND}
    assert found("image", typed=typed) == Columns(image="image", label="fine_label")
    assert found("image", "label", typed={"image": Image(), "x": KIND, "y": KIND}).label == "label"


def test_named_columns_are_taken() -> None:
    named = {"text": "b", "text_pair": "c", "label": "d"}
    assert found("text", "text", "label", "b", "c", "d", **named) == Columns(text="b", text_pair="c", label="d")
    typed = {"image": Image(), "thumb": Image(), "label": KIND}
    assert found("image", "kind", typed=typed, image="thumb", label="kind") == Columns(image="thumb", label="kind")


def test_language_modelling_has_prompts_and_responses_and_no_label() -> None:
    assert found("language", "prompt", "answer", "label", response="answer") == Columns(text="prompt", response="answer")
    wanted = Columns(text="instruction", text_pair="input", response="output")
    assert found("language", "instruction", "input", "output", response="output", text_pair="input") == wanted


def test_a_response_is_no_prompt_of_itself() -> None:
    with pytest.raises(ConfigError, match=r"^data\.text: no column found; name one of text, other$"):
        found("language", "text", "other", response="text")


@pytest.mark.parametrize("task", ["image", "text", "language"])
def test_the_owners_column_is_needed_only_where_virtual_sites_share(task: str) -> None:
    names = ("image", "text", "label", "answer")
    response = "answer" if task == "language" else ""
    assert found(task, *names, "ward", response=response, site="ward", shared=True).site == "ward"
    assert found(task, *names, response=response, site="ward").site == ""
    with pytest.raises(ConfigError, match=r"^data\.site = 'ward': no such column; there are image, text, label, answer$"):
        found(task, *names, response=response, site="ward", shared=True)


@pytest.mark.parametrize("key", ["text", "text_pair", "label"])
def test_an_unknown_column_is_an_error_that_lists_those_there_are(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.{key.replace('_', '-')} = 'x': no such column; there are text, label$"):
        found("text", "text", "label", **{key: "x"})


@pytest.mark.parametrize(
    ("task", "names", "typed", "key"),
    [
        ("text", ("a", "label"), {}, "text"),
        ("text", ("text", "b"), {}, "label"),
        ("image", ("a", "label"), {}, "image"),
        ("image", ("label",), {"a": Image(), "b": Image()}, "image"),
        ("image", (), {"image": Image(), "a": KIND, "b": KIND}, "label"),
        ("language", ("a", "b"), {}, "text"),
    ],
)
def test_a_column_that_cannot_be_told_is_an_error_that_lists_those_there_are(
    task: str, names: tuple[str, ...], typed: dict[str, object], key: str
) -> None:
    listed = ", ".join([*names, *typed])
    with pytest.raises(ConfigError, match=rf"^data\.{key}: no column found; name one of {listed}$"):
        found(task, *names, typed=typed, response="b" if task == "language" else "")


@pytest.mark.parametrize("inner", [Value("int64"), Value("string"), ClassLabel(names=["a", "b"])])
def test_lists_of_labels_are_refused_by_name(inner: object) -> None:
    features = Features({"text": Value("string"), "label": List(inner)})
    with pytest.raises(
        ConfigError,
        match=r"^data\.label: column 'label' holds lists: several classes of one record need problem-type multi-label",
    ):
        find_columns(features, DataSettings(), "text")
