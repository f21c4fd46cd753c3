"""What a filter is handed at each step of a round, at a site and at the server, and that its memory is of a slot's own steps."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lalora_flwr.adapter.slots import Slot
from lalora_flwr.methods.filters import NONE, Around, Filter, State
from lalora_flwr.methods.method import method_of
from lalora_flwr.methods.over_time import DOPPLER
from lalora_flwr.methods.schedules import schedule_of
from lalora_flwr.privacy.mechanism import Mechanism
from lalora_flwr.privacy.randomness import SeededRandom
from lalora_flwr.server.stepping import ServerStep
from lalora_flwr.settings import TrainSettings
from lalora_flwr.training.local import LocalRound, Memory, train_round
from tests.conftest import small
from tests.reference import OpenLedger, bench
from tests.training.rounds import NON_PRIVATE, PRIVATE


class Noted(Filter):
    """Another filter, of which it notes what goes in and out."""

    remembers = True

    def __init__(self, filter: Filter) -> None:
        self._filter = filter
        self.seen: dict[str, list[tuple[Tensor, Tensor, float]]] = defaultdict(list)

    def __call__(self, slot: Slot, gradient: Tensor, state: State, around: Around) -> Tensor:
        out = self._filter(slot, gradient, state, around)
        self.seen[slot.name].append((gradient.clone(), out.clone(), around.noise))
        return out


def rounds(filter: Filter, memory: Memory, mechanism: Mechanism, *, empty: bool = False, count: int = 2) -> None:
    """Rounds of a site that goes on with its memory; five steps each: B, A, B, A, B."""
    b = bench()
    layout = b.learner.adapter.layout
    records = b.records.take(torch.arange(0)) if empty else b.records
    for server_round in range(1, count + 1):
        masks = schedule_of("step:BA").masks(layout, server_round, 5, {})
        what = LocalRound(server_round, layout, masks, filter, TrainSettings(local_steps=5, lr=0.3))
        source = SeededRandom(0, 0, server_round)
        train_round(b.learner, records, what, mechanism=mechanism, ledger=OpenLedger(), source=source, memory=memory)


def test_a_slots_filter_goes_on_at_its_own_steps_and_over_rounds() -> None:
    noted = Noted(DOPPLER)
    rounds(noted, {}, PRIVATE)
    for name, steps in noted.seen.items():
        assert len(steps) == (6 if "lora_B" in name else 4)
        state: State = {}
        for gradient, out, noise in steps:
            torch.testing.assert_close(out, DOPPLER(Slot("", "", "", ()), gradient, state, Around(noise)))


def test_the_noise_it_is_told_is_the_noise_there_is() -> None:
    noted = Noted(NONE)
    rounds(noted, {}, PRIVATE, empty=True, count=30)
    (told,) = {noise for steps in noted.seen.values() for _, _, noise in steps}
    values = torch.cat([gradient.flatten() for steps in noted.seen.values() for gradient, _, _ in steps])
    assert told == PRIVATE.noise_std / PRIVATE.expected_batch
    assert float(values.std()) == pytest.approx(told, rel=5 / math.sqrt(2 * len(values)))
    plain = Noted(DOPPLER)
    rounds(plain, {}, NON_PRIVATE)
    assert {noise for steps in plain.seen.values() for _, _, noise in steps} == {0.0}


def test_where_the_server_steps_it_is_told_the_noise_of_the_mean(tmp_path: Path) -> None:
    settings = small(tmp_path, train__local_steps=1, train__step_at="server")
    noted = Noted(DOPPLER)
    layout = bench().learner.adapter.layout
    step = ServerStep(settings, layout, dataclasses.replace(method_of(settings), filter=noted))
    zeros = {name: np.zeros(slot.shape, dtype=np.float32) for name, slot in layout.items()}
    step(1, zeros, zeros, 0.25)
    assert {noise for steps in noted.seen.values() for _, _, noise in steps} == {0.25}
    assert set(noted.seen) == layout.names
