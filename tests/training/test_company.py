"""When passes of several sites are worth it, and what that may do to their gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lalora_flwr.adapter.lora import LORA
from lalora_flwr.data.inputs import Inputs
from lalora_flwr.gradients.dropout import remove_dropout
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.gradients.records import Owners
from lalora_flwr.models.base import BaseModel
from lalora_flwr.models.text import SequenceClassifier
from lalora_flwr.settings import LoraSettings
from lalora_flwr.training.company import ROOM, company
from lalora_flwr.training.learner import Learner
from lalora_flwr.training.together import ALONE, MOST_RECORDS, Company, SharedPasses, alone
from tests.conftest import MODELS, small
from tests.gradients.test_self_check_texts import text_base
from tests.training.sharing import Blind, a_pass, ticking


@pytest.fixture
def learner(tmp_path: Path) -> Learner:
    return MODELS.learner(small(tmp_path))


def test_company(learner: Learner) -> None:
    """Where this processor gives a row of many the bits that it gives a row of few; where not, there is none."""
    found = company(learner, 10.0, clock=ticking(1e-3))
    assert found == ALONE or (found.sites == MOST_RECORDS // 10 and 1 <= found.fewest <= 10)
    assert company(learner, 10.0, clock=ticking(0.1)).sites in (found.sites, 5)  # a pass takes half a second at most
    assert company(learner, 10.0, clock=ticking(0.3)) == ALONE
    assert company(learner, MOST_RECORDS, clock=ticking(1e-3)) == ALONE


def test_no_company_where_time_grows_with_the_records(learner: Learner) -> None:
    seconds = 0.0
    calls = itertools.count()

    def clock() -> float:
        """Three passes of one site, then three of twelve: twelve times as long."""
        nonlocal seconds
        call = next(calls)
        if call % 2:
            seconds += 1e-3 if call < 6 else 12e-3
        return seconds

    assert company(learner, 10.0, clock=clock) == ALONE


def test_no_company_where_records_miss_their_sites_values(learner: Learner) -> None:
    assert company(replace(learner, engine=Blind(learner.engine)), 10.0, clock=ticking(1e-3)) == ALONE


def test_within_rounding_sites_are_doubled_while_a_record_gets_cheaper(learner: Learner) -> None:
    assert company(learner, 10.0, True, ticking(1e-3)) == Company(8, 1, round(ROOM * 80), rounding=True)
    assert company(learner, 10.0, True, ticking(0.3)) == ALONE  # slow
    assert company(learner, MOST_RECORDS, True, ticking(1e-3)) == ALONE


def test_no_company_within_rounding_where_records_miss_their_sites_values(learner: Learner) -> None:
    assert company(replace(learner, engine=Blind(learner.engine)), 10.0, True, ticking(1e-3)) == ALONE


class Small(Blind):
    """Memory for so many records at once, and no more."""

    def __init__(self, engine: PerSampleGradients, most: int) -> None:
        super().__init__(engine)
        self.most, self.seen = most, list[int]()

    def __call__(self, records: int, losses: Callable[[], Tensor], owners: Owners | None = None) -> dict[str, Tensor]:
        self.seen.append(records)
        if records > self.most:
            raise torch.OutOfMemoryError("no room")
        return self._engine(records, losses, owners)


def test_company_is_as_large_as_memory_has_room_for(learner: Learner) -> None:
    assert company(replace(learner, engine=Small(learner.engine, 50)), 10.0, True, ticking(1e-3)).sites == 4
    assert company(replace(learner, engine=Small(learner.engine, 5)), 10.0, True, ticking(1e-3)) == ALONE


def test_passes_that_find_no_memory_get_smaller_and_stay_so(learner: Learner) -> None:
    engine = Small(learner.engine, 12)
    watched, shared = replace(learner, engine=engine), SharedPasses(Company(9, 1, rounding=True))
    passes = [a_pass(watched, seed, 5) for seed in range(5)]
    for _ in range(2):
        answers = [answer() for answer in shared(passes)]
        assert all(near(answer, alone(replace(one, whole=learner))) for one, answer in zip(passes, answers, strict=True))
    assert engine.seen == [25, 10, 10, 5, 10, 10, 5]


def near(one: tuple[dict[str, Tensor], Tensor], other: tuple[dict[str, Tensor], Tensor]) -> bool:
    gradients = [(value, other[0][name]) for name, value in one[0].items()]
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in [*gradients, (one[1], other[1])])


def text_learner(base: BaseModel, engine: type[PerSampleGradients] = PerSampleGradients) -> Learner:
    remove_dropout(base.module)
    adapter = LORA.attach(base, LoraSettings(rank=2, head="frozen"), 0)
    return Learner(base, adapter, engine(adapter.model, adapter.parameters), adapter.state())


class Counting(PerSampleGradients):
    seen: tuple[int, ...] = ()

    def __call__(self, records: int, losses: Callable[[], Tensor], owners: Owners | None = None) -> dict[str, Tensor]:
        self.seen += (records,)
        return super().__call__(records, losses, owners)


@pytest.mark.parametrize("rounding", [False, True])
def test_texts_of_different_lengths_meet_within_rounding_only(rounding: bool) -> None:
    learner = text_learner(text_base(32), Counting)
    long, short = a_pass(learner, 0, 3), a_pass(learner, 1, 4)
    assert isinstance(short.inputs, dict)
    short = replace(short, inputs={name: value[:, :8] for name, value in short.inputs.items()})
    passes = [long, short]
    answers = [answer() for answer in SharedPasses(Company(9, 1, rounding=rounding))(passes)]
    assert isinstance(learner.engine, Counting) and learner.engine.seen == ((7,) if rounding else (3, 4))
    assert all(near(answer, alone(one)) for one, answer in zip(passes, answers, strict=True))


def test_company_of_texts() -> None:
    assert company(text_learner(text_base(32)), 10.0, True, ticking(1e-3)).sites == 8


@dataclass(frozen=True)
class SeesPadding(SequenceClassifier):
    """Takes what texts are filled up with for tokens."""

    def filled_up(self, inputs: Inputs, labels: Tensor, tokens: int) -> tuple[Inputs, Tensor]:
        filled, labels = super().filled_up(inputs, labels, tokens)
        assert isinstance(filled, dict)
        return {**filled, "attention_mask": torch.ones_like(filled["attention_mask"])}, labels


def test_no_company_where_padding_shows() -> None:
    assert company(text_learner(text_base(32, "bert")), 10.0, True, ticking(1e-3)) != ALONE
    made = text_base(32, "bert")
    base = SeesPadding(made.name, made.module, made.head, made.targets, made.input_shape, 2, max_tokens=32)
    assert company(text_learner(base), 10.0, True, ticking(1e-3)) == ALONE
