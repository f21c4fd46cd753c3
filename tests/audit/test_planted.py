"""Real records with canaries among them, and what runs over halves of them say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lalora_flwr.audit.planted import (
    GRADIENT,
    KINDS,
    MISLABELLED,
    RANDOM,
    REAL,
    SHARE,
    PlantedLearners,
    Pool,
    pool_of,
    projections,
)
from lalora_flwr.audit.shadows import coins, confidences, of_pool, run_over
from lalora_flwr.data.digits import private_part
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.settings import Settings
from tests.conftest import MODELS, small


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return small(tmp_path, num_rounds=1, privacy__epsilon=float("inf"))


def pool(settings: Settings, *, plant: bool = True) -> Pool:
    return pool_of(settings, MODELS.learner(settings), plant=plant)


def test_canaries_take_the_place_of_some_records(settings: Settings) -> None:
    planted, plain = pool(settings), pool(settings, plant=False)
    assert len(planted.sites) == 3 and len(planted.kinds) == 1100 and set(plain.kinds) == {REAL}
    assert sorted(planted.numbers()) == list(range(planted.gradients))
    for site, own in zip(planted.sites, plain.sites, strict=True):
        each = int(SHARE * len(site))
        assert [int((site.kinds == kind).sum()) for kind in range(len(KINDS))] == [len(site) - 3 * each, each, each, each]
        whole = torch.arange(len(site))
        (inputs, labels), (real, true) = site.batch(whole), own.batch(whole)
        same = (inputs == real).flatten(1).all(1)
        assert torch.equal(same, site.kinds != RANDOM)
        assert torch.equal(labels == true, site.kinds == REAL) or bool((labels == true)[site.kinds == RANDOM].any())
        assert not (labels == true)[(site.kinds == MISLABELLED) | (site.kinds == GRADIENT)].any()
        assert (labels[site.kinds == GRADIENT] >= 10).all() and (labels[site.kinds != GRADIENT] < 10).all()
        assert torch.equal(site.batch(whole.flip(0))[0].flip(0), inputs)  # the same record in any batch


def test_the_records_are_the_runs_own(settings: Settings) -> None:
    images, _ = private_part()
    found = torch.cat([site.batch(torch.arange(len(site)))[0] for site in pool(settings, plant=False).sites])
    assert {tuple(row) for row in found.flatten(1).tolist()} == {tuple(row) for row in images.flatten(1).tolist()}


def test_gradients_of_canaries_are_orthogonal_and_those_of_others_their_own(settings: Settings) -> None:
    planted = pool(settings)
    learner, plain = PlantedLearners(MODELS, planted, 2.0).learner(settings), MODELS.learner(settings)
    site = planted.sites[0]
    rows = torch.cat([torch.nonzero(site.kinds == kind).flatten()[:4] for kind in (REAL, GRADIENT)])
    inputs, labels = site.batch(rows)
    for one in (learner, plain):
        one.adapter.activate(one.adapter.trainable)
    found, losses = learner.gradients(inputs, labels)
    own, own_losses = plain.gradients(inputs[:4], labels[:4])
    assert all(torch.equal(found[name][:4], own[name]) for name in own) and torch.equal(losses[:4], own_losses)
    flat = torch.cat([value[4:].flatten(1) for value in found.values()], 1)
    assert torch.allclose(flat @ flat.t(), 4 * torch.eye(4), atol=1e-5)


def test_a_small_slot_leaves_room_for_canaries_in_others(tmp_path: Path) -> None:
    headed = small(tmp_path, num_rounds=1, lora__head="trained", privacy__epsilon=float("inf"))  # its bias has ten entries
    planted = pool(headed)
    assert planted.gradients > 100
    learner = PlantedLearners(MODELS, planted, 3.0).learner(headed)
    learner.adapter.activate(learner.adapter.trainable)
    site = planted.sites[-1]
    rows = torch.nonzero(site.kinds == GRADIENT).flatten()
    found, _ = learner.gradients(*site.batch(rows))
    flat = torch.cat([value.flatten(1) for value in found.values()], 1)
    assert torch.allclose(flat @ flat.t(), 9 * torch.eye(len(rows)), atol=1e-4)


def test_an_adapter_that_went_a_canarys_way_shows_it(settings: Settings) -> None:
    planted = pool(settings)
    learner = PlantedLearners(MODELS, planted, 1.0).learner(settings)
    learner.adapter.load(learner.initial)
    learner.adapter.activate(learner.adapter.trainable)
    site = planted.sites[1]
    third = torch.nonzero(site.kinds == GRADIENT).flatten()[2:3]
    found, _ = learner.gradients(*site.batch(third))
    learner.adapter.load({name: learner.initial[name] - 0.5 * value[0] for name, value in found.items()})
    place = planted.numbers().tolist().index(int(site.labels[third]) - planted.classes)
    assert np.allclose(projections(learner, planted), 0.5 * (np.arange(planted.gradients) == place), atol=1e-6)


def test_a_run_depends_on_its_coins_and_number_alone(settings: Settings) -> None:
    planted = pool(settings)
    inside = coins(settings, planted, 7)
    assert np.array_equal(inside, coins(settings, planted, 7)) and 480 < inside.sum() < 620
    first = run_over(settings, MODELS, planted, inside, 7)
    again = run_over(settings, MODELS, planted, inside, 7)
    other = run_over(settings, MODELS, planted, inside, 8)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    learner = MODELS.learner(settings)
    learner.adapter.load(first)
    found = of_pool(learner, planted)
    assert found.shape == (1100,) and np.isfinite(found).all()
    gradients = planted.kinds == GRADIENT
    assert found[gradients & inside].mean() > found[gradients & ~inside].mean()


def test_confidences_are_logits_of_the_labels_probability(settings: Settings) -> None:
    learner, site = MODELS.learner(settings), pool(settings, plant=False).sites[0]
    inputs, labels = site.batch(torch.arange(20))
    with torch.inference_mode():
        p = learner.base.logits(learner.adapter.model.eval(), inputs).double().softmax(1)[torch.arange(20), labels]
    assert np.allclose(confidences(learner, site)[:20], torch.logit(p).numpy(), atol=1e-6)


def test_records_at_real_sites_cannot_be_attacked(settings: Settings, tmp_path: Path) -> None:
    real = small(tmp_path, data__name="sites", data__labels="a,b", data__test="file:x.csv", data__records=10, model__name="hf/x")
    with pytest.raises(ConfigError, match="the records are at the sites"):
        pool_of(real, MODELS.learner(settings), plant=True)
