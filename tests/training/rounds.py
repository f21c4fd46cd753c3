"""Rounds of a site on a bench."""

from __future__ import annotations

from typing import Any

import pytest

from lalora_flwr.methods.filters import filter_of
from lalora_flwr.methods.schedules import schedule_of
from lalora_flwr.privacy.mechanism import Mechanism
from lalora_flwr.settings import TrainSettings
from lalora_flwr.training.local import LocalRound, train_round
from tests.reference import (
    Bench,
    OpenLedger,
    Replay,
)

RECORDS, SCALE = 12, 3.0 / 2  # alpha / rank of `tests.reference.adapted`


PRIVATE = Mechanism(noise_multiplier=0.8, clip_norm=0.25, sample_rate=0.5, expected_batch=6.0)


NON_PRIVATE = Mechanism(noise_multiplier=0.0, clip_norm=0.25, sample_rate=0.5, expected_batch=6.0)


STEPS = TrainSettings(local_steps=5, lr=0.3)


def serve(b: Bench, mechanism: Mechanism = PRIVATE, train: TrainSettings = STEPS, **choices: Any) -> int:
    """One round of LA-LoRA with fixed draws, unless told otherwise."""
    layout, server_round = b.learner.adapter.layout, choices.get("server_round", 1)
    masks = schedule_of(choices.get("schedule", "step:BA")).masks(layout, server_round, train.local_steps, {})
    gradient_filter = filter_of(choices.get("filter_name", "gauss5"))
    return train_round(
        b.learner,
        choices.get("records", b.records),
        LocalRound(server_round, layout, masks, gradient_filter, train),
        mechanism=mechanism,
        ledger=choices.get("ledger") or OpenLedger(),
        source=choices.get("source") or Replay(),
        memory={},
    )


SIGMAS = pytest.mark.parametrize("mechanism", [PRIVATE, NON_PRIVATE], ids=["private", "non-private"])
