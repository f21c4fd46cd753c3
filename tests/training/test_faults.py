"""Records that make a model fail: each contributes nothing, and changes nothing about the others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lalora_flwr.data.inputs import Inputs
from lalora_flwr.data.records import Records, no_records
from lalora_flwr.methods.filters import NONE
from lalora_flwr.models.base import BaseModel
from lalora_flwr.privacy.mechanism import Mechanism
from lalora_flwr.settings import TrainSettings
from lalora_flwr.training.local import LocalRound, train_round
from tests.reference import Bench, Everyone, OpenLedger, Replay, bench, joint_norm

RECORDS, MARK = 9, 1e6
MECHANISM = Mechanism(noise_multiplier=0.8, clip_norm=0.25, sample_rate=0.5, expected_batch=6.0)
STEP = TrainSettings(local_steps=1, lr=1.0)


class Touchy(BaseModel):
    """Fails on every batch that holds a marked record, as an embedding does on a token that it lacks."""

    def losses(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> Tensor:
        assert isinstance(inputs, Tensor)
        losses = super().losses(model, inputs, labels)
        if (inputs[:, 0] == MARK).any():
            raise IndexError("index out of range in self")
        return losses


class Unreadable(Records):
    """Fails to make any batch that holds a marked record."""

    def batch(self, indices: Tensor) -> tuple[Any, Tensor]:
        inputs, labels = super().batch(indices)
        if (inputs[:, 0] == MARK).any():  # type: ignore[call-overload, index]
            raise OSError("gone")
        return inputs, labels


class Ungroupable(Records):
    def parts(self, indices: Tensor, most: int) -> list[Tensor]:
        raise ValueError("no order")


def everything(b: Bench, train: TrainSettings, *, tolerant: bool = False) -> LocalRound:
    """All slots train at every step."""
    layout = b.learner.adapter.layout
    return LocalRound(1, layout, [layout.names], NONE, train, tolerant)


def release(keep: list[int], marked: set[int], *, physical: int, kind: str, source: Any = None, tolerant: bool = True) -> Bench:
    """One step with the same noise, whatever the records are; lr / expected batch times the noised sum moves B."""
    b = bench(records=RECORDS)
    b.records.inputs[sorted(marked), 0] = MARK  # type: ignore[index]
    learner = b.learner
    if kind == "model":
        base = Touchy(**{f.name: getattr(b.base, f.name) for f in fields(b.base)})
        learner = replace(learner, base=base)
    made: dict[str, Callable[..., Records]] = {"model": Records, "records": Unreadable, "parts": Ungroupable}
    records = made[kind](b.records.inputs[keep], b.records.labels[keep])  # type: ignore[index]
    train_round(
        learner,
        records,
        everything(b, replace(STEP, max_physical_batch=physical), tolerant=tolerant),
        mechanism=MECHANISM,
        ledger=OpenLedger(),
        source=source or Everyone(),
        memory={},
    )
    return b


def moved(a: Bench, b: Bench) -> float:
    """How far apart the released sums are."""
    one, other = a.state(), b.state()
    return MECHANISM.expected_batch * joint_norm({name: one[name].double() - other[name].double() for name in one})


@pytest.mark.parametrize("kind", ["model", "records"])
@pytest.mark.parametrize("physical", [0, 1, 2, 4])
def test_a_record_that_fails_is_as_good_as_absent(kind: str, physical: int) -> None:
    everybody = list(range(RECORDS))
    whole = release(everybody, {4}, physical=physical, kind=kind)
    without = release([i for i in everybody if i != 4], set(), physical=physical, kind=kind)
    assert moved(whole, without) < 1e-5


@given(marked=st.sets(st.integers(0, RECORDS - 1)), gone=st.integers(0, RECORDS - 1), physical=st.integers(0, RECORDS))
def test_one_record_moves_the_sum_by_at_most_c_whoever_fails(marked: set[int], gone: int, physical: int) -> None:
    """The noise is the same on both sides. Dropping the part of a failing record would take all of its records out."""
    everybody = list(range(RECORDS))
    whole = release(everybody, marked, physical=physical, kind="model")
    without = release([i for i in everybody if i != gone], marked, physical=physical, kind="model")
    assert moved(whole, without) <= MECHANISM.clip_norm * (1 + 1e-4)


def test_all_that_fail_leave_noise_alone() -> None:
    failing = release(list(range(RECORDS)), set(range(RECORDS)), physical=0, kind="model")
    assert moved(failing, release([], set(), physical=0, kind="model")) == 0
    assert moved(failing, bench(records=RECORDS)) > MECHANISM.clip_norm


def test_records_that_cannot_be_grouped_go_one_by_one() -> None:
    everybody = list(range(RECORDS))
    one_by_one = release(everybody, set(), physical=4, kind="parts", source=Replay())
    assert moved(one_by_one, release(everybody, set(), physical=4, kind="model", source=Replay())) < 1e-5


@pytest.mark.parametrize("kind", ["model", "records", "parts"])
def test_in_a_simulation_a_failure_is_an_error(kind: str) -> None:
    with pytest.raises((IndexError, OSError, ValueError)):
        release(list(range(RECORDS)), {4}, physical=0, kind=kind, tolerant=False)


def test_the_owner_is_told_and_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "lalora_flwr.site"):
        release(list(range(RECORDS)), {2, 4}, physical=0, kind="model")
    assert "2 drawn records made the model fail and contributed nothing" in caplog.text


@pytest.mark.parametrize("physical", [0, 3])
def test_no_records_are_a_set_like_any_other(physical: int) -> None:
    b, ledger = bench(records=RECORDS), OpenLedger()
    train = replace(STEP, local_steps=3, max_physical_batch=physical)
    before = b.state()
    for source in (Everyone(), Replay()):
        what = everything(b, train)
        train_round(b.learner, no_records(), what, mechanism=MECHANISM, ledger=ledger, source=source, memory={})
    assert ledger.taken == 6 and not any(torch.equal(t, before[n]) for n, t in b.state().items())
