"""A server that sends a chaotic adapter: rounding then lets one record move the gradients of all that are computed with it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context
from torch import Tensor, nn

from lalora_flwr.data import digits
from lalora_flwr.data.inputs import Inputs
from lalora_flwr.data.records import Records, RecordSet, Subset
from lalora_flwr.methods.filters import NONE
from lalora_flwr.models.base import BaseModel
from lalora_flwr.privacy.mechanism import Mechanism
from lalora_flwr.settings import Settings, TrainSettings, settings_from
from lalora_flwr.site.records import RecordStore
from lalora_flwr.training.learner import Learner
from lalora_flwr.training.local import LocalRound, train_round
from tests.conftest import MODELS, small
from tests.ledger.site_ledgers import owned
from tests.reference import Everyone, OpenLedger, generator, joint_norm
from tests.sites import real_app
from tests.sites import train_order as order

C = 0.01
COUNTS = range(2, 10)


@pytest.fixture(scope="module")
def chaotic() -> Learner:
    """The default model with factors so large that the last bits of an activation decide about the output."""
    learner = MODELS.learner(settings_from({}), "cpu")
    with torch.no_grad():
        for i, parameter in enumerate(learner.adapter.parameters.values()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator(i)) * 15)
    return learner


def released(learner: Learner, count: int, together: int) -> dict[str, Tensor]:
    """How far one step with next to no noise moves the adapter, times the batch: the clipped sum of the first records."""
    state = {name: p.detach().clone() for name, p in learner.adapter.parameters.items()}
    images, labels = digits.private_part()
    layout = learner.adapter.layout
    train_round(
        learner,
        Records(images[:count], labels[:count]),
        LocalRound(1, layout, [layout.names], NONE, TrainSettings(local_steps=1, lr=1e4, max_physical_batch=together)),
        mechanism=Mechanism(1e-9, C, 1.0, 1.0),
        ledger=OpenLedger(),
        source=Everyone(),
        memory={},
    )
    moved = {}
    with torch.no_grad():
        for name, parameter in learner.adapter.parameters.items():
            moved[name] = (state[name].double() - parameter.double()) / 1e4
            parameter.copy_(state[name])
    return moved


def furthest(learner: Learner, together: int) -> float:
    """The most that the last of some records moves the sum of all, in units of C."""
    sums = [released(learner, count, together) for count in (COUNTS[0] - 1, *COUNTS)]
    return max(joint_norm({n: two[n] - one[n] for n in one}) / C for one, two in itertools.pairwise(sums))


def test_alone_a_record_moves_the_sum_by_c_whatever_the_adapter(chaotic: Learner) -> None:
    """Hole 4 in its general form. Steps of 1e4 in float32 factors leave the sums 2e-10 of rounding an entry, 1e-6 of C in all."""
    assert furthest(chaotic, 1) <= 1 + 1e-5


class Rounding(BaseModel):
    """A network whose last bits depend on the batch, as those of kernels do on some machines for some sizes."""

    def logits(self, model: nn.Module, inputs: Inputs) -> Tensor:
        assert isinstance(inputs, Tensor)
        return super().logits(model, inputs + 1e-7 * inputs.sum(0, keepdim=True))


def test_the_attack_has_teeth_where_records_are_computed_together(chaotic: Learner) -> None:
    """This processor's own kernels gave 3.4 C for four records; here every size has its rounding."""
    base = Rounding(**{f.name: getattr(chaotic.base, f.name) for f in dataclasses.fields(chaotic.base)})
    rounding = dataclasses.replace(chaotic, base=base)
    assert furthest(rounding, 0) > 1.2
    assert furthest(rounding, 1) <= 1 + 1e-5


@pytest.mark.parametrize(("owners", "runs", "together"), [(None, 0, 1), (None, 7, 1), (5, 0, 5), (5, 3, 3)])
def test_a_real_site_decides_itself_how_many_records_meet(
    owners: int | None,
    runs: int,
    together: int,
    tmp_path: Path,
    context: Callable[[Settings], Context],
) -> None:
    seen: set[int] = set()
    store = RecordStore()

    class Noted(Subset):
        def parts(self, indices: Tensor, most: int) -> list[Tensor]:
            seen.add(most)
            return super().parts(indices, most)

    def noted(*arguments: Any) -> RecordSet:
        records = store(*arguments)
        return Noted(records, torch.arange(len(records)))

    settings = small(tmp_path, train__max_physical_batch=runs)
    more: dict[str, Any] = {} if owners is None else {"records-at-once": owners}
    assert not real_app(records=noted)(order(settings), owned(context(settings), tmp_path, **more)).has_error()
    assert seen == {together}
