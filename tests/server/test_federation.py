"""The next adapter is the mean of the replies, and each method moves what it should."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lalora_flwr.methods.merges import MEAN
from lalora_flwr.methods.method import Method
from lalora_flwr.settings.choices import METHODS
from tests.conftest import (
    Finished,
    arrays_of,
    factors_of,
)
from tests.server.federations import assert_equal, changed, mean_of
from tests.sites import servers_learner

NEEDED = {"steady-lora": {"train__local_steps": 1}, "central-dp-lora": {"num_supernodes": 1}}


def averaged() -> list[str]:
    """Strategies whose factors the server averages; those of other forms do nothing else, and some are for texts."""
    methods = {name: METHODS.get(name, Method) for name in METHODS.names()}
    return [name for name, method in methods.items() if method.merge is MEAN and method.form.startswith("lora")]


@pytest.mark.parametrize("strategy", averaged())
def test_the_next_rounds_adapter_is_the_mean_of_the_replies(strategy: str, finished: Callable[..., Finished]) -> None:
    run = finished(strategy=strategy, **NEEDED.get(strategy, {}))
    first, second = run.spy.training(1), run.spy.training(2)
    for order, _ in second:
        received = arrays_of(order)
        assert_equal({n: received[n] for n in arrays_of(first[0][1])}, mean_of(first))
    assert_equal({n: run.checkpoint[n] for n in arrays_of(second[0][1])}, mean_of(second))


@pytest.mark.parametrize(
    ("strategy", "round_1", "round_2"),
    [
        ("la-lora", {"A", "B"}, {"A", "B"}),
        ("dp-lora", {"A", "B"}, {"A", "B"}),
        ("ffa-lora", {"B"}, {"B"}),
        ("rolora", {"B"}, {"A"}),
    ],
)
def test_each_strategy_moves_the_factors_it_should(
    strategy: str, round_1: set[str], round_2: set[str], finished: Callable[..., Finished]
) -> None:
    one, two = finished(strategy=strategy, num_rounds=1), finished(strategy=strategy)
    initial = servers_learner(two.settings).initial
    assert changed(initial, one.checkpoint) == round_1
    middle = {**initial, **arrays_of(two.spy.training(2)[0][0])}
    assert changed(initial, middle) == round_1 and changed(middle, two.checkpoint) == round_2


def test_a_trained_head_moves_and_a_frozen_one_is_not_there(finished: Callable[..., Finished]) -> None:
    trained, frozen = finished(lora__head="trained"), finished()
    assert "head" in changed(servers_learner(trained.settings).initial, trained.checkpoint)
    assert "head" not in factors_of(frozen.checkpoint)
