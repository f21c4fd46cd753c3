"""Which sites a round asks: a share of them, each in turn, none too often."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord
from hypothesis import given
from hypothesis import strategies as st

from lalora_flwr.engines.inline import InlineGrid
from lalora_flwr.engines.virtual_grid import FIRST_NODE
from lalora_flwr.ground.errors import RunFailed
from lalora_flwr.server.strategy import FederatedStrategy
from lalora_flwr.settings import flatten
from lalora_flwr.wire.tensors import to_arrays
from tests.conftest import (
    SITES,
    Finished,
    Spy,
    run_spied,
    small,
)
from tests.sites import servers_learner


@pytest.mark.parametrize(("sites", "share", "drawn"), [(4, 0.5, 2), (3, 0.5, 2)])
def test_a_round_asks_the_share_of_sites_and_no_site_too_often(sites: int, share: float, drawn: int, tmp_path: Path) -> None:
    rounds = 3
    settings = small(
        tmp_path,
        num_rounds=rounds,
        num_supernodes=sites,
        fraction_train=share,
        privacy__max_rounds=-(-rounds * drawn // sites),
        privacy__accountant="rdp",
        train__local_steps=1,
    )
    spies = [Spy(), Spy()]
    run = Finished(run_spied(settings, spies[0]), settings, spies[0])
    served = [[order.metadata.dst_node_id for order, _ in spies[0].training(r)] for r in range(1, rounds + 1)]
    assert [len(set(nodes)) for nodes in served] == [len(nodes) for nodes in served] == [drawn] * rounds
    assert [line["sites"] for line in run.metrics] == [drawn] * rounds
    asked = [sum(nodes.count(FIRST_NODE + number) for nodes in served) for number in range(sites)]
    assert max(asked) <= settings.privacy.max_rounds
    counted = {int(number): counters["steps"] for number, counters in run.summary["sites"].items()}
    assert counted == {number: times for number, times in enumerate(asked) if times}
    assert max(line["epsilon"] for line in run.metrics) <= settings.privacy.epsilon
    again = small(tmp_path, **{**flatten_overrides(settings), "run_name": "again"})
    run_spied(again, spies[1])
    assert served == [[order.metadata.dst_node_id for order, _ in spies[1].training(r)] for r in range(1, rounds + 1)]


def flatten_overrides(settings: Any) -> dict[str, Any]:
    return {name.replace(".", "__").replace("-", "_"): value for name, value in flatten(settings).items()}


class Choosy(InlineGrid):
    """A grid of which some nodes may be gone."""

    here: list[int] | None = None

    def get_node_ids(self) -> list[int]:
        return super().get_node_ids() if self.here is None else self.here


class Draws:
    """The server's choice of sites, without any training."""

    def __init__(self, folder: Path, **overrides: Any) -> None:
        self.settings = small(folder, **overrides)
        self.grid = Choosy(SITES, self.settings.num_supernodes, dict(flatten(self.settings)))
        learner = servers_learner(small(folder))
        self.strategy = FederatedStrategy(self.settings, learner.adapter.layout, lambda report: None)
        self.arrays = to_arrays(learner.initial)

    def in_round(self, server_round: int) -> list[int]:
        """The numbers of the sites asked."""
        orders = self.strategy.configure_train(server_round, self.arrays, ConfigRecord(), self.grid)
        return [order.metadata.dst_node_id - FIRST_NODE for order in orders]


@given(sites=st.integers(1, 7), share=st.floats(0.05, 1), rounds=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_sites_take_turns_so_that_the_fewest_rounds_each_suffice(sites: int, share: float, rounds: int, seed: int) -> None:
    drawn = max(1, round(share * sites))
    fewest = -(-rounds * drawn // sites)
    draws = Draws(Path(), num_supernodes=sites, fraction_train=share, num_rounds=rounds, seed=seed, privacy__max_rounds=fewest)
    asked = [draws.in_round(r) for r in range(1, rounds + 1)]
    assert [len(set(numbers)) for numbers in asked] == [len(numbers) for numbers in asked] == [drawn] * rounds
    assert all(numbers == sorted(numbers) for numbers in asked)
    times = [sum(numbers.count(site) for numbers in asked) for site in range(sites)]
    assert max(times) <= fewest and max(times) - min(times) <= 1


def test_a_site_that_served_its_rounds_is_not_asked_again_though_the_others_are_gone(tmp_path: Path) -> None:
    draws = Draws(tmp_path, num_supernodes=3, num_rounds=3, fraction_train=0.34, privacy__max_rounds=1)
    (served,) = draws.in_round(1)
    draws.grid.here = [FIRST_NODE + served]
    assert draws.in_round(2) == []
    with pytest.raises(RunFailed, match="no site may serve another round"):
        draws.strategy.aggregate_train(2, [])


def test_another_seed_draws_other_sites(tmp_path: Path) -> None:
    drawn = set()
    for seed in range(5):
        spy = Spy()
        run_spied(
            small(
                tmp_path,
                run_name=f"seed-{seed}",
                seed=seed,
                num_rounds=1,
                num_supernodes=4,
                fraction_train=0.25,
                train__local_steps=1,
                privacy__epsilon=math.inf,
            ),
            spy,
        )
        drawn.add(spy.training(1)[0][0].metadata.dst_node_id)
    assert len(drawn) > 1
