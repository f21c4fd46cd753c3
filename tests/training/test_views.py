"""Several views of each image: what they are, and that a record adds the clipped mean of its own views' gradients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lalora_flwr.data.records import Records
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.filters import NONE
from lalora_flwr.methods.schedules import BOTH
from lalora_flwr.privacy.mechanism import Mechanism, PrivateSum
from lalora_flwr.settings import TrainSettings, settings_from
from lalora_flwr.training.local import LocalRound, gradient_round
from lalora_flwr.training.views import REACH, views
from tests.attacks.attacker import Draws
from tests.conftest import MODELS, Finished, Spy, run_spied, small
from tests.reference import OpenLedger, generator

MECHANISM = Mechanism(noise_multiplier=1.0, clip_norm=0.5, sample_rate=1.0, expected_batch=5.0)


def images(count: int, side: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, side, side, generator=generator(seed))


def shifted(image: Tensor) -> list[Tensor]:
    """All views that there can be, by brute force."""
    reach = image.shape[-1] // REACH
    side = image.shape[-1]
    found = []
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            rows = (torch.arange(side) + down).clamp(0, side - 1)
            columns = (torch.arange(side) + right).clamp(0, side - 1)
            found.append(image[:, rows][:, :, columns])
    return found


@given(count=st.integers(1, 6), seed=st.integers(0, 2**32), flips=st.booleans())
def test_views_are_shifts_and_mirrored_shifts(count: int, seed: int, flips: bool) -> None:
    originals = images(3, seed=seed % 7)
    seeds = torch.rand(3, generator=generator(seed % 2**31), dtype=torch.float64)
    made = views(originals, seeds, count, flips=flips)
    assert made.shape == (3 * count, 2, 16, 16)
    for number, view in enumerate(made):
        possible = shifted(originals[number // count])
        possible += [one.flip(-1) for one in possible] if flips else []
        assert any(torch.equal(view, one) for one in possible)


def test_all_shifts_and_both_sides_occur() -> None:
    original = images(1)
    made = views(original, torch.tensor([0.3], dtype=torch.float64), 3000, flips=True)
    for one in shifted(original[0]):
        assert 3 < sum(torch.equal(view, one) for view in made) < 200
        assert any(torch.equal(view, one.flip(-1)) for view in made)


def test_views_of_an_image_depend_on_its_own_seed_alone() -> None:
    originals, seeds = images(4), torch.rand(4, dtype=torch.float64, generator=generator(1))
    made = views(originals, seeds, 3, flips=True).unflatten(0, (4, 3))
    order = torch.tensor([2, 0, 3])
    assert torch.equal(views(originals[order], seeds[order], 3, flips=True).unflatten(0, (3, 3)), made[order])


class Kept(PrivateSum):
    """Keeps what it is given."""

    given: list[Mapping[str, Tensor]]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.given = []

    def add(self, per_sample: Mapping[str, Tensor]) -> None:
        self.given.append({name: g.clone() for name, g in per_sample.items()})
        super().add(per_sample)


def collected(records: Any, train: TrainSettings, folder: Path, *, tolerant: bool = False) -> dict[str, Tensor]:
    """The per-record gradients of a step over all records, (records, *shape)."""
    learner = MODELS.learner(small(folder, lora__head="trained"))
    learner.adapter.load(learner.initial)
    layout = learner.adapter.layout
    what = LocalRound(1, layout, [BOTH.mask(layout, 1, 0, {})], NONE, train, tolerant=tolerant)
    kept: list[Kept] = []

    def make(*arguments: Any) -> Kept:
        kept.append(Kept(*arguments))
        return kept[-1]

    source = Draws(4)
    gradient_round(
        learner,
        records,
        what,
        lambda total: total.release(OpenLedger(), source),
        mechanism=MECHANISM,
        ledger=OpenLedger(),
        source=source,
        make_sum=make,
    )
    return {name: torch.cat([given[name] for given in kept[0].given]) for name in kept[0].given[0]}


def digits(count: int = 5) -> Records:
    draw = generator(2)
    return Records(torch.rand(count, 1, 8, 8, generator=draw), torch.randint(0, 10, (count,), generator=draw))


@pytest.mark.parametrize("most", [0, 2])
def test_a_record_gives_the_mean_gradient_of_its_views(most: int, tmp_path: Path) -> None:
    records, train = digits(), TrainSettings(local_steps=1, augmentations=3, flips=True, max_physical_batch=most)
    found = collected(records, train, tmp_path)
    learner = MODELS.learner(small(tmp_path, lora__head="trained"))
    learner.adapter.load(learner.initial)
    source = Draws(4)
    source.uniform(5)  # the sample
    made = views(records.inputs, source.uniform(5), 3, flips=True).unflatten(0, (5, 3))
    active = learner.adapter.activate(learner.adapter.layout.names)
    for record in range(5):
        label = records.labels[record].expand(3)
        loss = nn.functional.cross_entropy(learner.base.logits(learner.adapter.model, made[record]), label)
        for name, gradient in zip(active, torch.autograd.grad(loss, list(active.values())), strict=True):
            torch.testing.assert_close(found[name][record], gradient, rtol=1e-4, atol=1e-6)


def test_a_record_more_or_less_changes_no_other_records_views(tmp_path: Path) -> None:
    train = TrainSettings(local_steps=1, augmentations=2, max_physical_batch=1)
    whole, without = (
        collected(digits(5), train, tmp_path),
        collected(Records(*(t[:4] for t in all_of(digits(5)))), train, tmp_path),
    )
    for name in whole:
        assert torch.equal(whole[name][:4], without[name])


def all_of(records: Records) -> tuple[Tensor, Tensor]:
    inputs: Any = records.inputs
    return inputs, records.labels


class Torn(Records):
    """Images of which one cannot be read."""

    def batch(self, indices: Tensor) -> Any:
        return super().batch(indices[indices != 2])


@pytest.mark.parametrize("tolerant", [True, False])
@pytest.mark.parametrize("most", [0, 1, 3])
def test_an_image_that_cannot_be_read_gives_nothing_and_moves_no_other(tolerant: bool, most: int, tmp_path: Path) -> None:
    train = TrainSettings(local_steps=1, augmentations=2, max_physical_batch=most)
    whole, torn = collected(digits(), train, tmp_path), collected(Torn(*all_of(digits())), train, tmp_path, tolerant=tolerant)
    for name in whole:
        torch.testing.assert_close(torn[name], whole[name][[0, 1, 3, 4]], rtol=1e-4, atol=1e-6)


def test_a_run_with_views_ends_elsewhere_and_the_same_each_time(tmp_path: Path) -> None:
    ends = []
    for name, count in (("a", 1), ("b", 2), ("c", 2)):
        settings, spy = small(tmp_path / name, num_rounds=1, train__augmentations=count), Spy()
        ends.append(Finished(run_spied(settings, spy), settings, spy).checkpoint)
    assert all(torch.equal(ends[1][name], ends[2][name]) for name in ends[1])
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


@pytest.mark.parametrize(
    ("flat", "said"),
    [
        ({"model.name": "hf/x", "data.name": "hub:x", "train.augmentations": 2}, "train.augmentations = 2: only for images"),
        ({"train.flips": True}, "train.flips = true: mirrors views of train.augmentations"),
        ({"train.augmentations": 0}, "train.augmentations = 0: must be"),
    ],
)
def test_what_makes_no_sense_is_refused(flat: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}"):
        settings_from(flat)
