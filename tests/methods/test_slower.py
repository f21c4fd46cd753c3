"""A slower lora_A: what it does, and where it could do nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lalora_flwr.adapter.slots import HEAD, LORA_A, LORA_B, Slot
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.filters import Around, filter_of
from lalora_flwr.methods.slower import SLOW_A
from lalora_flwr.server.plan import make_plan
from tests.conftest import small


def test_lora_a_alone_is_slowed() -> None:
    gradient = torch.randn(3, 4)
    for part, share in ((LORA_A, 0.1), (LORA_B, 1.0), (HEAD, 1.0)):
        assert torch.equal(SLOW_A(Slot("x", "m", part, (3, 4)), gradient, {}, Around(1.0)), gradient * share)
    assert filter_of("slow-a:0.25").scale(Slot("x", "m", LORA_A, (3, 4))) == 0.25


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"strategy": "dp-lora", "train__optimizer": "adamw", "train__lr": 0.003}, "which train.optimizer = 'adamw' undoes"),
        ({"strategy": "fed-sb"}, "the form trains no lora_A"),
        ({"strategy": "ffa-lora"}, "scales nothing that 'B' trains"),
        *(({"filter__name": f"slow-a:{wrong}"}, "with a number between 0 and 1") for wrong in ("0", "1", "nan", "1e-9", "-0.5")),
    ],
)
def test_where_it_could_do_nothing_it_is_refused(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_plan(small(Path("x"), **{"filter__name": "slow-a", **overrides}))


@pytest.mark.parametrize("strategy", ["ffa-lora", "la-lora", "fed-sb"])
def test_clipping_apart_where_nothing_trains_beside_lora_a_is_refused(strategy: str) -> None:
    with pytest.raises(ConfigError, match="so nothing is clipped apart"):
        make_plan(small(Path("x"), strategy=strategy, privacy__clipping="apart"))


def test_clipping_apart_is_taken_where_lora_a_trains_beside_a_head_or_without_noise() -> None:
    make_plan(small(Path("x"), privacy__clipping="apart", lora__head="trained"))
    make_plan(small(Path("x"), privacy__clipping="apart", privacy__epsilon=float("inf")))
