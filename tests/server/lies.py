"""What sites of a run can be made to say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, Context, Message, MetricRecord, RecordDict

from lalora_flwr.privacy.accounting import epsilon_spent, noise_multiplier_for
from lalora_flwr.settings import Settings
from lalora_flwr.wire.orders import ARRAYS
from lalora_flwr.wire.replies import COUNTERS, Counters
from tests.conftest import AppCall, Spy

LIAR = 1  # the site that lies


ROUNDS, STEPS = 2, 2


Lie = Callable[[RecordDict], None]


def lying(lie: Lie, *rounds: int, reals: bool = False) -> Spy:
    """One site that spoils its replies of some rounds; with ``reals`` the sites pass for real ones."""

    def behave(message: Message, context: Context, app: AppCall) -> Message:
        reply = app(message, context)
        kind = message.metadata.message_type
        if reals and kind == "query.identity":
            reply.content["identity"] = MetricRecord({"site": -1, "sites": -1})
        if kind == "train" and not reply.has_error():
            if reals:
                counters_of(reply.content)["seeded"] = 0
            if context.node_config["partition-id"] == LIAR and message.content["config"]["server-round"] in rounds:
                lie(reply.content)
        return reply

    return Spy(behave)


def counters_of(content: RecordDict) -> Any:
    return content[COUNTERS]


def scaled(factor: float) -> Lie:
    """All tensors times a factor."""

    def lie(content: RecordDict) -> None:
        arrays: Any = content[ARRAYS]
        for name in arrays:
            arrays[name] = Array((arrays[name].numpy() * np.float32(factor)).astype(np.float32))

    return lie


def not_a_number(content: RecordDict) -> None:
    arrays: Any = content[ARRAYS]
    name = sorted(arrays)[0]
    arrays[name] = Array(np.full_like(arrays[name].numpy(), math.nan))


def honest(settings: Settings, q: float, rounds: int) -> Counters:
    privacy = settings.privacy
    sigma = noise_multiplier_for(privacy.epsilon, privacy.delta, q, settings.steps_per_site, privacy.accountant)
    steps = rounds * settings.train.local_steps
    return Counters(steps, epsilon_spent([(sigma, q, steps)], privacy.delta, privacy.accountant), sigma, q, seeded=True)
