"""The run-config keys ``data.*``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from lalora_flwr.ground.lists import ends_of
from lalora_flwr.settings.choices import DATASETS
from lalora_flwr.settings.keys import Kind, at_least, choice, key, named, positive, whole


def _one_group(pattern: str) -> bool:
    try:
        return re.compile(pattern).groups == 1
    except re.error:
        return False


def _range(text: str) -> bool:
    try:
        return bool(ends_of(text))
    except ValueError:
        return False


SEPARATORS = ("auto", "comma", "semicolon", "tab", "pipe")


def _encodes(name: str) -> bool:
    try:
        return "".encode(name) is not None
    except (LookupError, ValueError):
        return False


@dataclass(frozen=True)
class DataSettings:
    """The private records, how virtual sites share them, and the public records that the server evaluates on."""

    KIND: ClassVar[Kind] = Kind.BUDGET

    name: str = named(
        "digits",
        "digits (embedded), or a data set of an installed package; hub:<dataset>[/<config>][@revision]; file:<glob or folder> of "
        "CSV, TSV, JSON lines, Parquet or images; sites: each real site reads its own data-path",
        DATASETS,
        "hub:<dataset>",
        "file:<glob or folder>",
        "sites",
    )
    split: str = key("train", "split of the data set that the sites share")
    test: str = key(
        "auto",
        "public records for evaluation: auto (the split test, else validation), split:<name>, file:<glob or folder>, or "
        "hold-out:<share> of the private records",
        "auto, split:<name>, file:<glob or folder> or hold-out:<share between 0 and 1>",
        lambda v: v == "auto" or bool(re.fullmatch(r"(split|file):.+|hold-out:0?\.\d+", v)),
    )
    test_records: int = at_least(0, 0, "evaluate on at most this many of them, drawn with a fixed seed; 0: all")
    image: str = key("", "column of the images; empty: found by its type or name")
    text: str = key("", "column of the texts (of the prompts, for language modelling); empty: found by its name")
    text_pair: str = key("", "column of the second texts; empty: found by its name; none: there is none")
    label: str = key(
        "",
        "column of the labels; empty: found by its type or name, or if data.labels are columns of 0 and 1 (multi-label), these",
    )
    problem_type: str = choice(
        "single-label",
        "what a label is: single-label (one class), multi-label (any number of classes), regression (a number)",
        "single-label",
        "multi-label",
        "regression",
    )
    label_range: str = key(
        "",
        "for regression, the public bounds of the numbers: low,high. A record beyond them is left out",
        "low,high: two numbers, the smaller first",
        lambda v: not v or _range(v),
    )
    response: str = key("", "column of the responses; naming it makes the task language modelling, with loss on them only")
    site: str = key("", "column that says whose record it is, for data.partition = natural")
    labels: str = key(
        "", "label names in the order of the classes, comma-separated (one with a comma in double quotes); empty: the data set's"
    )
    encoding: str = key(
        "auto",
        "how text files are encoded: auto (UTF-8, or UTF-16 with a byte order mark), or a name such as latin-1",
        "auto or an encoding that Python knows, such as utf-8, utf-16 or latin-1",
        lambda v: v == "auto" or _encodes(v),
    )
    separator: str = choice(
        "auto", "what separates the fields of CSV files; auto: a comma, or what the first line has instead", *SEPARATORS
    )
    num_classes: int = at_least(0, 0, "how many classes there are, for lalora plan without the data; 0: count them")
    records: int = at_least(
        0, 0, "how many private records there are, for lalora plan without the data; 0: count them", kind=Kind.PERFORMANCE
    )
    max_tokens: int = whole(2, 2**20, 128, "texts are cut to this many tokens (a prompt at its start: the response stays)")
    answer: str = key(
        "",
        "regular expression whose first group is the answer in a response; language models are then also graded by exact match",
        "a regular expression with one group",
        lambda v: not v or _one_group(v),
    )
    partition: str = choice(
        "iid",
        "how virtual sites share the records: iid (equal parts), dirichlet (by label), pathological (few classes a site), "
        "shards (of records sorted by label), size-skewed, natural (by data.site)",
        "iid",
        "dirichlet",
        "pathological",
        "shards",
        "size-skewed",
        "natural",
    )
    beta: float = positive(1.0, "Dirichlet concentration: the smaller, the more the sites differ")
    min_records: int = at_least(1, 10, "fewest records a site may hold; Dirichlet splits are drawn again until all hold as many")
    classes_per_site: int = at_least(1, 2, "classes of a site, for data.partition = pathological")
    shards_per_site: int = at_least(1, 2, "shards of a site, for data.partition = shards")
    size_skew: str = choice(
        "linear", "how the sizes of size-skewed sites grow with their number", "linear", "square", "exponential"
    )
