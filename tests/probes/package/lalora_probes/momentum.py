"""A filter over time: heavy-ball momentum that goes on from round to round."""

from __future__ import annotations

import torch
from torch import Tensor

from lalora_flwr.adapter.slots import Slot
from lalora_flwr.methods.filters import Around, Filter, State


class Momentum(Filter):
    name = "probe-momentum"
    remembers = True

    def __call__(self, slot: Slot, gradient: Tensor, state: State, around: Around) -> Tensor:
        state["velocity"] = 0.8 * state.get("velocity", torch.zeros_like(gradient)) + gradient
        return state["velocity"]


FILTER = Momentum()
