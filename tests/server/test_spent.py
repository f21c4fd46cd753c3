"""ε of a run: the largest over its sites, computed anew for those that were asked."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lalora_flwr.server.counts import SiteCounts
from lalora_flwr.server.spent import Spent
from lalora_flwr.settings import Settings
from lalora_flwr.settings.stages import ridge_stage
from tests.conftest import small


def largest(counts: SiteCounts) -> float:
    return max((counts.epsilon_of(site) for site in counts.heard()), default=0.0)


def serve(counts: SiteCounts, site: int, sigma: float) -> None:
    count = counts.of(site)
    count.heard, count.noise_multiplier, count.sample_rate = True, sigma, 0.1
    count.rounds += 1


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return small(tmp_path, num_rounds=8)


def test_it_is_the_largest_over_all_sites_after_every_round(settings: Settings) -> None:
    counts, draw = SiteCounts(settings), random.Random(0)
    assert counts.epsilon() == 0.0
    for _ in range(6):
        for site in draw.sample(range(8), 3):
            serve(counts, site, 1.0 + site)
        assert counts.epsilon() == largest(counts) > 0
    again = SiteCounts(settings)
    again.restore(counts.state(), {})
    assert again.epsilon() == counts.epsilon()
    again.restore(counts.state(), {"7": {"rounds": 8}})
    assert again.epsilon() == largest(again)


def test_what_a_stage_before_released_counts_whoever_looked_at_it(settings: Settings) -> None:
    counts = SiteCounts(settings, before=SiteCounts(ridge_stage(settings)))
    assert counts.before
    serve(counts.before, 3, 2.0)
    assert counts.before.epsilon() > 0
    assert counts.epsilon() == largest(counts) > 0


def test_only_sites_that_were_touched_are_looked_at() -> None:
    looked: list[int] = []

    def compute(site: int) -> tuple[float, float]:
        looked.append(site)
        return float(site), site / 2

    spent = Spent()
    spent.touch([3, 1])
    assert spent.largest(compute, None) == (3.0, 1.5) and sorted(looked) == [1, 3]
    spent.touch([2])
    assert spent.largest(compute, None)[0] == 3.0 and sorted(looked) == [1, 2, 3]
