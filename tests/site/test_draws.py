"""Who decides a site's draws: the operating system, and in a simulation the seed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from lalora_flwr.privacy.randomness import RandomSource, SeededRandom, SystemRandom
from lalora_flwr.settings import Settings, flatten
from lalora_flwr.site.host import in_ray_worker
from lalora_flwr.site.round import Site
from lalora_flwr.wire.orders import ARRAYS, CONFIG, TrainOrder
from lalora_flwr.wire.replies import COUNTERS
from lalora_flwr.wire.tensors import to_arrays
from tests.conftest import arrays_of, small
from tests.ledger.site_ledgers import DIGITS_SITE, steps_in
from tests.site.failures import MakeContext, MakeReal, Untouchable, raising
from tests.sites import REAL, VIRTUAL, host, real_app
from tests.sites import train_order as order


def test_in_a_simulation_the_seed_decides_and_the_counters_say_so(tmp_path: Path, context: MakeContext) -> None:
    settings = small(tmp_path)
    one, two = (VIRTUAL(order(settings), context(settings)) for _ in range(2))
    assert one.content[COUNTERS]["seeded"] == two.content[COUNTERS]["seeded"] == 1
    assert all(torch.equal(tensor, arrays_of(two)[name]) for name, tensor in arrays_of(one).items())


def test_outside_of_a_simulation_the_seed_decides_nothing(tmp_path: Path, real: MakeReal) -> None:
    settings = small(tmp_path, seed=3)
    replies = []
    for _ in range(2):
        torch.manual_seed(0)
        replies.append(REAL(order(settings), real(settings)))
    one, two = replies
    assert one.content[COUNTERS]["seeded"] == two.content[COUNTERS]["seeded"] == 0
    assert not any(torch.equal(tensor, arrays_of(two)[name]) for name, tensor in arrays_of(one).items())


def test_only_a_ray_worker_makes_a_simulation_of_flowers_own_process() -> None:
    """The inline engine says so by value, as `tests.sites` does."""
    started = False
    fake: Any = SimpleNamespace(is_initialized=lambda: started)
    assert not in_ray_worker({})
    assert not in_ray_worker({"ray": fake})
    started = True
    assert in_ray_worker({"ray": fake})


def source(simulated: bool, settings: Settings, site: int, server_round: int) -> RandomSource:
    owner = {} if simulated else {**DIGITS_SITE, "ledger-path": "ledger"}
    node_config = {"partition-id": site, "num-partitions": 2, **owner}
    context = Context(1, 7, node_config, RecordDict(), dict(flatten(settings)))
    return Site.of(host(simulated=simulated), context).source(settings, server_round)


def test_a_real_site_draws_from_the_operating_system_and_a_virtual_one_from_the_seed(tmp_path: Path) -> None:
    settings = small(tmp_path, seed=3)
    assert isinstance(source(False, settings, 0, 1), SystemRandom)
    assert isinstance(source(True, settings, 0, 1), SeededRandom)


def test_simulated_draws_differ_by_seed_by_site_and_by_round(tmp_path: Path) -> None:
    cases = [(True, small(tmp_path, seed=seed), number, r) for seed in (0, 1) for number in (0, 1) for r in (1, 2)]
    noise = {tuple(source(*case).normal(torch.Size([8])).tolist()) for case in cases}
    sampling = {tuple(source(*case).uniform(8).tolist()) for case in cases}
    assert len(noise) == len(sampling) == 8


def test_in_a_simulation_the_count_travels_in_the_sites_state_and_nothing_else_does(tmp_path: Path, context: MakeContext) -> None:
    held = context(settings := small(tmp_path))
    VIRTUAL(order(settings), held)
    assert set(held.state) == {"ledger"} and isinstance(held.state["ledger"], ConfigRecord)
    assert set(held.state["ledger"]) == {"noise-multiplier", "sample-rate", "steps"}


OTHER_KIND = "data: the run's data.problem-type or data.label-range is not what the site's node-config says"


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({}, "data: the run's data.labels are not the classes that the site's node-config names, in its order"),
        (
            {"data__labels": "b,a"},
            "data: the run's data.labels are not the classes that the site's node-config names, in its order",
        ),
        (
            {"data__labels": "a,b,c", "data__num_classes": 0},
            "data: the run's data.labels are not the classes that the site's node-config names, in its order",
        ),
        ({"data__labels": "a,b", "data__problem_type": "multi-label"}, OTHER_KIND),
        ({"data__num_classes": 0, "data__problem_type": "regression", "data__label_range": "0,1"}, OTHER_KIND),
        ({"data__response": "r"}, "data: the run's task is not the one that the site's node-config names"),
        ({"model__name": "timm/x"}, "data: the run's task is not the one that the site's node-config names"),
        ({"data__labels": "a,b"}, "data: the site's node-config names no data-path"),
        ({"data__labels": "a,b", "data__max_tokens": 65}, "data: the run's data.max-tokens are above the site's max-tokens"),
    ],
    ids=str,
)
def test_a_run_cannot_make_a_real_site_read_files_or_count_other_classes(
    asked: dict[str, Any], reason: str, tmp_path: Path, real: MakeReal
) -> None:
    app = real_app(learners=Untouchable(), records=raising(AssertionError("something was read")))
    run = {"model__name": "hf/x", "data__name": "file:/etc/*.csv", "data__num_classes": 2, "data__max_tokens": 64, **asked}
    settings = small(tmp_path, **run)
    config = TrainOrder(1, "", "").to_record()
    message = Message(RecordDict({ARRAYS: to_arrays({}), CONFIG: config}), dst_node_id=7, message_type="train")
    held = real(settings, task="text", labels="a,b", **{"max-tokens": 64})
    assert app(message, held).error.reason == reason
    assert steps_in(held) == 0
