"""Passes that several sites share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lalora_flwr.gradients.records import Owners
from lalora_flwr.training.learner import Learner
from lalora_flwr.training.together import MOST_RECORDS, Company, SharedPasses, of_size
from tests.conftest import MODELS, small
from tests.training.sharing import Blind, a_pass


@pytest.fixture
def learner(tmp_path: Path) -> Learner:
    return MODELS.learner(small(tmp_path))


@pytest.fixture
def precise(learner: Learner) -> Iterator[Learner]:
    """In float64; its frozen weights are everybody's, and are narrowed again without loss."""
    learner.adapter.model.double()
    yield learner
    learner.adapter.model.float()


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("by_record", [False, True])
def test_each_record_meets_its_own_sites_values(by_record: bool, part: str, precise: Learner) -> None:
    """Against one record at a time on a model that holds the site's values."""
    learner = precise
    passes = [a_pass(learner, seed, records, part) for seed, records in enumerate([4, 7, 5])]
    passes = [replace(one, inputs=one.inputs.double()) for one in passes if isinstance(one.inputs, Tensor)]
    for one, found in zip(passes, SharedPasses(Company(9, 1, by_record=by_record))(passes), strict=True):
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
    good, bad, other = SharedPasses(Company(9, 1))(passes)
    with pytest.raises(IndexError):
        bad()
    for one, found in ((passes[0], good), (passes[2], other)):
        ((alone, _),) = [answer() for answer in SharedPasses(Company(9, 1))([one])]
        assert all(torch.allclose(alone[name], found()[0][name], rtol=1e-4, atol=1e-6) for name in alone)


def test_sites_that_train_other_tensors_or_hold_other_shapes_do_not_meet(learner: Learner) -> None:
    """They all get their own gradients none the less."""
    one, other = a_pass(learner, 0, 4, "lora_A"), a_pass(learner, 1, 4, "lora_B")
    first, second = (answer()[0] for answer in SharedPasses(Company(9, 1))([one, other]))
    assert first.keys() == one.active and second.keys() == other.active


@given(st.lists(st.integers(1, 2 * MOST_RECORDS), min_size=1, max_size=30))
def test_groups_hold_every_pass_once_and_not_too_many_records(records: list[int]) -> None:
    groups = of_size(records, MOST_RECORDS)
    assert [place for group in groups for place in group] == list(range(len(records)))
    assert all(len(group) == 1 or sum(records[place] for place in group) <= MOST_RECORDS for group in groups)


def test_passes_of_few_records_go_alone(learner: Learner) -> None:
    seen: list[int] = []

    class Watched(Blind):
        def __call__(self, records: int, losses: Callable[[], Tensor], owners: Owners | None = None) -> dict[str, Tensor]:
            seen.append(len(owners.counts) if owners else 1)
            return self._engine(records, losses, owners)

    watched = replace(learner, engine=Watched(learner.engine))
    SharedPasses(Company(9, 4))([a_pass(watched, seed, records) for seed, records in enumerate([5, 3, 4, 1])])
    assert sorted(seen) == [1, 1, 2]
