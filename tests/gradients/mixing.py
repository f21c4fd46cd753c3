"""Models that mix the records of a batch, and the check before training on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lalora_flwr.models.base import BaseModel
from tests.adapters import check as check_model
from tests.reference import CLASSES, adapted


class Mixing(nn.Module):
    """(n, tokens, 4) through a layer that may mix, then two adapted layers, then the mean over the tokens."""

    def __init__(self, mix: Callable[[nn.Module, Tensor], Tensor], tokens: int) -> None:
        super().__init__()
        self.mix, self.tokens = mix, tokens
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.mix(self, torch.tanh(self.first(x))))
        return self.head(y.mean(1))


def mixing(mix: Callable[[nn.Module, Tensor], Tensor], tokens: int = 6) -> BaseModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BaseModel("test/mixing", Mixing(mix, tokens), "head", ("first", "second"), (tokens, 4), CLASSES)


def check(base: BaseModel, training: bool = False, **lora: object) -> nn.Module:
    model = adapted(base, **lora)
    model.train(training)
    check_model(base, model)
    return model


def keep(_: nn.Module, x: Tensor) -> Tensor:
    return x


def neighbour_in_batch(_: nn.Module, x: Tensor) -> Tensor:
    return x + 0.1 * x.roll(1, dims=0)
