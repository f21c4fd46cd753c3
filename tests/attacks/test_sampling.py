"""Which records join a step, and where a site's chance comes from: nothing that a run says decides either."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from lalora_flwr.privacy.randomness import SystemRandom
from tests.attacks.attacker import RECORDS, RUN, Draws, Site, table, text_model
from tests.attacks.orders import order

FLUKE = 1e-6
STEPS, ROUNDS, RATE = 20, 5, 0.25


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    return Site(table(folder / "records.csv"), text_model(folder / "model"), {"num-records": 8})


class Noted(SystemRandom):
    """The site's own source, with notes of what it drew."""

    def __init__(self, uniforms: list[Tensor], normals: list[Tensor]) -> None:
        super().__init__()
        self.uniforms, self.normals = uniforms, normals

    def uniform(self, n: int) -> Tensor:
        self.uniforms.append(drawn := super().uniform(n))
        return drawn

    def normal(self, shape: torch.Size) -> Tensor:
        self.normals.append(drawn := super().normal(shape))
        return drawn


def test_each_record_joins_each_step_by_itself_with_the_counted_rate(own: Site) -> None:
    """Hole 7: what the accountant assumes is what a real site does: Bernoulli(q), no memory between steps and rounds."""
    uniforms: list[Tensor] = []
    own = dataclasses.replace(own, entropy=lambda: Noted(uniforms, []))
    run = {**RUN, "train.local-steps": STEPS, "num-rounds": ROUNDS, "train.batch-size": 2, "privacy.accountant": "rdp"}
    sizes, rates = [], set()
    for server_round in range(1, ROUNDS + 1):
        served = own.serve(order(run, Path(own.model), server_round=server_round), run)
        assert not served.reason
        sizes += [step.records for step in served.steps]
        rates.add(served.reserved[0].q)
    assert rates == {RATE}
    uniforms = [drawn for drawn in uniforms if len(drawn) == len(RECORDS)]  # the others became noise
    joined = np.stack([(drawn < RATE).numpy() for drawn in uniforms])  # (steps, records)
    assert joined.shape == (STEPS * ROUNDS, len(RECORDS)) and joined.sum(1).tolist() == sizes
    low, high = binom.ppf([FLUKE, 1 - FLUKE], joined.size, RATE)
    assert low <= joined.sum() <= high
    low, high = binom.ppf([FLUKE, 1 - FLUKE], joined[1:].size, RATE**2)
    assert low <= (joined[1:] & joined[:-1]).sum() <= high  # a record in two steps running
    assert low <= (joined[:-1] & np.roll(joined[1:], 1, axis=1)).sum() <= high  # a record, then its neighbour
    draws = torch.cat(uniforms)
    assert len(draws.unique()) == len(draws)  # no stream starts anew


RUNS: dict[str, dict[str, Any]] = {
    "the same run": {},
    "a seed": {"seed": 12345},
    "one thread": {"train.num-threads": 1},
    "resumed": {"resume": True, "run-name": "run"},
    "simulated sites": {"num-supernodes": 4, "data.partition": "dirichlet"},
}


@pytest.mark.parametrize("name", RUNS)
def test_noise_is_never_repeated_whatever_the_run_says(name: str, own: Site) -> None:
    """Hole 8: a real site is not seeded: neither the run's keys, nor torch's, numpy's or Python's seeds decide its noise."""
    import random

    run = {**RUN, **RUNS[name]}
    message = order(run, Path(own.model))
    seen = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        served = own.serve(message, run)
        assert not served.reason and served.counters["seeded"] == 0
        seen.append({name: tensor.numpy() for name, tensor in served.tensors.items() if tensor.any()})
    moved = [n for n in seen[0] if not np.array_equal(seen[0][n], message.content["arrays"][n].numpy())]
    assert moved and all((seen[0][n] != seen[1][n]).mean() > 0.99 for n in moved)


def test_no_two_tensors_steps_or_rounds_share_a_draw(own: Site) -> None:
    """Hole 8: equal noise in two places is subtracted by whoever holds both."""
    normals: list[Tensor] = []
    own = dataclasses.replace(own, entropy=lambda: Noted([], normals))
    run = {**RUN, "strategy": "dp-lora", "train.local-steps": 3, "num-rounds": 4}
    for server_round in range(1, 5):
        assert not own.serve(order(run, Path(own.model), server_round=server_round), run, watch=False).reason
    draws = torch.cat([n.flatten() for n in normals]).double()
    assert len(draws) >= 4 * 3 * 4 * 32
    assert len(draws.unique()) >= len(draws) - 3  # float32 draws may meet by chance; a stream that starts anew meets in all


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_is_dropped_of_a_record_is_the_sites_secret_and_its_own(dropout: float, own: Site) -> None:
    """A relative of hole 8: a run switches dropout on, and a fresh process' torch starts from a seed that everybody knows.

    If masks follow from a record's place in its batch, one record less gives all others another mask, and the sum moves by
    far more than C. So either nothing is dropped, or what is dropped does not follow from a public state of torch.
    """
    run = {**RUN, "lora.dropout": dropout}
    message = order(run, Path(own.model))
    sums = []
    for _ in range(2):
        torch.manual_seed(67280421310721)  # torch's own, in every new process
        served = own.serve(message, run, draws=Draws())
        if served.reason:
            assert not served.reserved and dropout
            return
        sums.append(served.steps[0].total)
    assert torch.equal(sums[0], sums[1]) == (dropout == 0.0)
