"""Passes that several sites share, and when they are worth it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.gradients.records import Owners
from lalora_flwr.training.learner import Learner
from lalora_flwr.training.together import ALONE, MOST_RECORDS, Apart, Company, Pass, _of_size, company, taken
from tests.conftest import MODELS, small


@pytest.fixture
def learner(tmp_path: Path) -> Learner:
    return MODELS.learner(small(tmp_path))


@pytest.fixture
def precise(learner: Learner) -> Iterator[Learner]:
    """In float64; its frozen weights are everybody's, and are narrowed again without loss."""
    learner.adapter.model.double()
    yield learner
    learner.adapter.model.float()


def a_pass(learner: Learner, seed: int, records: int, part: str = "lora_B") -> Pass:
    """A site's, with values that no other site has."""
    generator, site = torch.Generator().manual_seed(seed), Apart(learner.adapter)
    with torch.no_grad():
        for value in site.parameters.values():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    site.activate(learner.adapter.layout.of(part))
    return Pass(learner, site, *learner.base.synthetic_batch(records, generator))


def test_each_record_meets_its_own_sites_values(precise: Learner) -> None:
    """Against one record at a time on a model that holds the site's values."""
    learner = precise
    passes = [a_pass(learner, seed, records) for seed, records in enumerate([4, 7, 5])]
    passes = [replace(one, inputs=one.inputs.double()) for one in passes if isinstance(one.inputs, Tensor)]
    for one, found in zip(passes, taken(passes, fewest=1), strict=True):
        gradients, losses = found()
        learner.adapter.load({name: value.detach() for name, value in one.adapter.parameters.items()})
        active = learner.adapter.activate(one.active)
        for j in range(len(one.labels)):
            loss = learner.adapter.losses(learner.base, *learner.base.single(one.inputs, one.labels, j)).sum()
            assert torch.allclose(losses[j], loss, rtol=1e-12)
            for name, want in zip(active, torch.autograd.grad(loss, list(active.values())), strict=True):
                assert torch.allclose(gradients[name][j], want, rtol=1e-9, atol=1e-12)


def test_what_one_site_does_wrong_fails_it_alone(learner: Learner) -> None:
    passes = [a_pass(learner, seed, 4) for seed in range(3)]
    passes[1] = replace(passes[1], labels=torch.full((4,), 99))
    good, bad, other = taken(passes, fewest=1)
    with pytest.raises(IndexError):
        bad()
    for one, found in ((passes[0], good), (passes[2], other)):
        ((alone, _),) = [answer() for answer in taken([one], fewest=1)]
        assert all(torch.allclose(alone[name], found()[0][name], rtol=1e-4, atol=1e-6) for name in alone)


def test_sites_that_train_other_tensors_or_hold_other_shapes_do_not_meet(learner: Learner) -> None:
    """They all get their own gradients none the less."""
    one, other = a_pass(learner, 0, 4, "lora_A"), a_pass(learner, 1, 4, "lora_B")
    first, second = (answer()[0] for answer in taken([one, other], fewest=1))
    assert first.keys() == one.active and second.keys() == other.active


@given(st.lists(st.integers(1, 2 * MOST_RECORDS), min_size=1, max_size=30))
def test_groups_hold_every_pass_once_and_not_too_many_records(records: list[int]) -> None:
    groups = _of_size(list(enumerate(records)))
    assert [place for group in groups for place in group] == list(range(len(records)))
    assert all(len(group) == 1 or sum(records[place] for place in group) <= MOST_RECORDS for group in groups)


def ticking(seconds: float) -> Callable[[], float]:
    """A clock on which every pass takes as long, however many records it has."""
    ticks = itertools.count()
    return lambda: next(ticks) * seconds


def test_company(learner: Learner) -> None:
    """Where this processor gives a row of many the bits that it gives a row of few; where not, there is none."""
    found = company(learner, 10.0, ticking(1e-3))
    assert found == ALONE or (found.sites == MOST_RECORDS // 10 and 1 <= found.fewest <= 10)
    assert company(learner, 10.0, ticking(0.1)).sites in (found.sites, 5)  # a pass takes half a second at most
    assert company(learner, 10.0, ticking(0.3)) == ALONE
    assert company(learner, MOST_RECORDS, ticking(1e-3)) == ALONE


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

    assert company(learner, 10.0, clock) == ALONE


class Blind(PerSampleGradients):
    """Lets all records meet the model's own values, as a layer's rule would that does not know of sites."""

    def __init__(self, engine: PerSampleGradients) -> None:
        self._engine = engine
        self.owned = engine.owned

    def __call__(self, records: int, losses: Callable[[], Tensor], owners: Owners | None = None) -> dict[str, Tensor]:
        return self._engine(records, losses)


def test_no_company_where_records_miss_their_sites_values(learner: Learner) -> None:
    assert company(replace(learner, engine=Blind(learner.engine)), 10.0, ticking(1e-3)) == ALONE


def test_passes_of_few_records_go_alone(learner: Learner) -> None:
    seen: list[int] = []

    class Watched(Blind):
        def __call__(self, records: int, losses: Callable[[], Tensor], owners: Owners | None = None) -> dict[str, Tensor]:
            seen.append(len(owners.counts) if owners else 1)
            return self._engine(records, losses, owners)

    watched = replace(learner, engine=Watched(learner.engine))
    taken([a_pass(watched, seed, records) for seed, records in enumerate([5, 3, 4, 1])], fewest=4)
    assert sorted(seen) == [1, 1, 2]
    assert Company(2, 4) != ALONE
