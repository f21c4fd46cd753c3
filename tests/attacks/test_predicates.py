"""Whether and what a site answers does not depend on its records, whatever the run calls them (hole 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lalora_flwr.ledger.file import create
from tests.attacks.attacker import RECORDS, RUN, Draws, Served, Site, table, text_model
from tests.attacks.orders import order
from tests.attacks.problems import problems

RARE = "the actor is not very good"  # the text of a record that one site holds
Rows = Sequence[Sequence[str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("model") / "model")


@dataclass
class Pair:
    """Two sites that differ in their records only, and one order for both."""

    model: Path
    folder: Path

    def site(self, name: str, rows: Rows, names: str = "text,label", **node_config: Any) -> Site:
        return Site(table(self.folder / f"{name}.csv", rows, names), self.model, node_config)

    def outcomes(self, run: dict[str, Any], one: Site, two: Site, **fields: Any) -> tuple[Served, Served]:
        run = {**RUN, **run}
        message = order(run, self.model, **fields)
        return one.serve(message, run, draws=Draws()), two.serve(message, run, draws=Draws())


@pytest.fixture
def pair(model: Path, tmp_path: Path) -> Pair:
    return Pair(model, tmp_path)


def told(served: Served) -> tuple[Any, ...]:
    """What a site tells about its records without noise: whether it answers, why not, and what it counts for it."""
    counted = [(entry.sigma, entry.q, entry.clip_norm, entry.steps, entry.epsilon) for entry in served.reserved]
    return served.reason, counted, () if served.reason else served.counters


BY_LABEL = {"data.text": "label", "data.label": "text", "data.labels": f"{RARE},zzz"}


def test_a_run_does_not_learn_who_holds_a_record(pair: Pair) -> None:
    """Hole 3: with the columns exchanged, only a site that holds the record named as a class answered, the other for free."""
    holder, other = pair.site("holder", [*RECORDS[:-1], (RARE, "good")]), pair.site("other", RECORDS[:-1])
    assert told(one := pair.outcomes(BY_LABEL, holder, other)[0]) == told(pair.outcomes(BY_LABEL, holder, other)[1])
    assert bool(one.reason) != bool(one.reserved)  # an answer is counted, a refusal is not


CHOICES = {
    "labels": {"data.labels": "bad,excellent"},
    "labels that nobody has": {"data.labels": "x,y"},
    "labels in another order": {"data.labels": "good,bad"},
    "more labels": {"data.labels": "bad,good,excellent"},
    "column of texts": {"data.text": "review"},
    "column of labels": {"data.label": "review"},
    "second texts": {"data.text-pair": "review"},
    "no second texts": {"data.text-pair": "none"},
    "column of responses": {"data.response": "review"},
    "column of images": {"data.image": "review"},
    "column of sites": {"data.site": "review", "data.partition": "natural"},
    "split": {"data.split": "test"},
    "data set": {"data.name": "file:/etc/passwd"},
    "counted classes": {"data.name": "file:/etc/passwd", "data.labels": "", "data.num-classes": 2},
    "no labels": {"data.name": "file:/etc/passwd", "data.labels": ""},
    "several classes": {"data.problem-type": "multi-label"},
    "numbers": {"data.problem-type": "regression", "data.label-range": "0,1", "data.labels": ""},
    "an answer": {"data.answer": "(actor)"},
    "another task": {"model.name": "timm/model"},
    "one token": {"data.max-tokens": 2},
}


@pytest.mark.parametrize("name", CHOICES)
def test_what_a_run_calls_the_records_decides_nothing(name: str, pair: Pair) -> None:
    """Hole 3: columns, classes, split and task are the owner's; a run could ask about each of them for nothing."""
    one = pair.site("one", [(*row, "good") for row in RECORDS], "text,label,review")
    two = pair.site("two", [(text, "excellent" if label == "good" else label) for text, label in RECORDS])
    first, second = pair.outcomes(CHOICES[name], one, two)
    assert told(first) == told(second)


NUMBERS = {"problem-type": "regression", "label-range": "0,10"}
OWNERS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {  # node-config, run, and two labels of one record
    "a number within the range, and one beyond": (NUMBERS, {}, "3", "300"),
    "a number, and a word": (NUMBERS, {}, "3", "good"),
    "the ends written another way": (NUMBERS, {"data.label-range": "0.0, 1e1"}, "3", "300"),
    "a narrower range": (NUMBERS, {"data.label-range": "0,5"}, "3", "7"),
    "a wider range": (NUMBERS, {"data.label-range": "0,1000"}, "3", "300"),
    "classes asked of numbers": (NUMBERS, {"data.problem-type": "single-label", "data.labels": "3,300"}, "3", "300"),
    "known classes, and an unknown one": ({"problem-type": "multi-label"}, {}, "bad|good", "bad|cough"),
    "a list, and half a list": ({"problem-type": "multi-label"}, {}, "[]", '["good'),
    "a class twice": ({"problem-type": "multi-label"}, {}, "good", "good;good"),
    "one class asked of several": ({"problem-type": "multi-label"}, {"data.problem-type": "single-label"}, "good", "bad|good"),
}


@pytest.mark.parametrize("name", OWNERS)
def test_what_a_label_is_is_the_owners_word(name: str, pair: Pair) -> None:
    """Whether a record counts follows from the owner's word and from that record alone; an answer tells neither."""
    owner, asked, usable, other = OWNERS[name]
    numbers = owner is NUMBERS
    rows = [(text, "5" if numbers else label) for text, label in RECORDS[:-1]]
    held = {**owner, "labels": None} if numbers else owner
    sites = [pair.site(f"{i}", [*rows, (RECORDS[-1][0], label)], **held) for i, label in enumerate((usable, other))]
    honest = {f"data.{key}": value for key, value in owner.items()} | ({"data.labels": ""} if numbers else {})
    first, second = pair.outcomes({**honest, **asked}, *sites)
    assert told(first) == told(second)
    refused = bool(asked) and name != "the ends written another way"
    assert bool(first.reason) == refused and bool(first.reserved) != refused, first.reason


EMPTY: dict[str, tuple[Rows, str]] = {
    "all classes unknown": ([(text, "excellent") for text, _ in RECORDS], "text,label"),
    "a class is missing": ([(text, "good") for text, _ in RECORDS], "text,label"),
    "one record": (RECORDS[:1], "text,label"),
    "no record": ((), "text,label"),
    "texts are blank": ([(" ", label) for _, label in RECORDS], "text,label"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_site_without_usable_records_answers_like_any_other(name: str, pair: Pair) -> None:
    """Hole 3: "no usable record" is a predicate of the records; such a site trains on nothing, with noise and a count."""
    first, second = pair.outcomes({}, pair.site("one", RECORDS), pair.site("two", *EMPTY[name]))
    assert told(first) == told(second)
    assert not second.reason and len(second.reserved) == 1
    tensors = [t - second.tensors[n] for n, t in first.tensors.items()]
    assert second.steps[0].noise.norm() > 0 and all(torch.isfinite(t).all() for t in tensors)


@pytest.mark.parametrize("left", [1, 2])
def test_the_last_records_of_a_site_are_protected_too(left: int, pair: Pair) -> None:
    """Hole 3: a site with one record and the same site with none."""
    run = {**RUN, "train.local-steps": 2}
    rows = RECORDS[-left:]
    found = problems(order(run, pair.model), run, pair.site("with", rows), pair.site("without", rows[:-1]))
    assert found == []


def test_a_physical_batch_of_one_does_not_make_time_an_answer(pair: Pair) -> None:
    """Hole 3: seconds told how many records match. What can be held without a clock: a cap on parts of a batch."""
    run = {**RUN, "train.max-physical-batch": 1, "train.batch-size": 4}
    rows = RECORDS * 2
    capped = {"max-physical-batches": 2}
    message = order(run, pair.model)
    many = pair.site("many", rows, **capped).serve(message, run, draws=Draws())
    few = pair.site("few", rows[:1], **capped).serve(message, run, draws=Draws())
    assert told(many) == told(few)


def test_a_server_does_not_ask_as_often_as_it_likes(pair: Pair) -> None:
    """Hole 3: each answer leaves at some moment, and enough of them would be a clock."""
    asked = pair.site("asked", RECORDS, **{"max-queries-per-day": 3})
    create(ledger := pair.folder / "ledger")
    message = order(RUN, pair.model)
    served = [asked.serve(message, RUN, ledger=ledger, run_id=run_id) for run_id in range(1, 6)]
    assert [bool(one.reason) for one in served] == [False] * 3 + [True] * 2
    assert not served[-1].reserved


def test_columns_that_are_missing_are_the_owners_fault_alone(pair: Pair) -> None:
    """Hole 3: a header is no record; a site without the columns that its owner means refuses, whatever the rows hold."""
    one, two = pair.site("one", RECORDS, "words,kind"), pair.site("two", (), "words,kind")
    first, second = pair.outcomes({}, one, two)
    assert told(first) == told(second) and first.reason and not first.reserved
