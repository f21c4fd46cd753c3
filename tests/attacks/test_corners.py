"""Sites that hold corners of an adapter, by their owner's profile or a server's directive: price and noise are the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict

from lalora_flwr.adapter.slots import corner, digest
from lalora_flwr.methods.method import method_of
from lalora_flwr.settings import settings_from
from lalora_flwr.wire.orders import ARRAYS, CONFIG, TrainOrder
from lalora_flwr.wire.profile import Profile
from lalora_flwr.wire.public import Public
from lalora_flwr.wire.tensors import to_arrays
from tests.attacks.attacker import RECORDS, RUN, Site, table, text_model
from tests.attacks.problems import problems
from tests.attacks.test_malicious_server import HUGE
from tests.reference import generator
from tests.sites import SERVER, stamp

LAYERS = [f"bert.encoder.layer.{number}.attention.self.query" for number in (0, 1)]
SIZES = [0.0, 1e-45, 1.0, 1e4, HUGE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    text_model(folder / "model")
    table(folder / "with.csv"), table(folder / "without.csv", RECORDS[:-1])
    return folder


def order_of(run: Mapping[str, Any], model: Path, words: str, directive: Public, size: float) -> Message:
    """An order for a site of this profile, whose tensors are all of one size; 0: as the seed draws them."""
    settings = settings_from({**run, "model.name": f"hf/{model}"})
    learner, method, draw = SERVER.learner(settings, "cpu"), method_of(settings), generator(5)
    held = method.schedule.within(method.travel.held(learner.adapter.layout, Profile(7, words)), directive)
    first = {name: corner(learner.initial[name], slot) for name, slot in held.items()}
    start = (
        {name: (torch.randn(value.shape, generator=draw) * size).clamp(-HUGE, HUGE) for name, value in first.items()}
        if size
        else first
    )
    told = TrainOrder(1, digest(start), learner.base.provenance.digest, directive=directive)
    stamp()
    content = RecordDict({ARRAYS: to_arrays(start), CONFIG: told.to_record()})
    return Message(content, dst_node_id=7, message_type="train")


CORNERS: dict[str, tuple[dict[str, Any], str, Public, int]] = {  # run, profile, directive, and the numbers that train
    "one component of one layer": ({"strategy": "hetlora"}, "rank=1 layers=1", {}, 32),
    "one component": ({"strategy": "flexlora", "train.local-steps": 2}, "rank=1", {}, 64),
    "ranks of a server": ({"strategy": "dynamic-rank"}, "", {"ranks": {LAYERS[0]: 1, LAYERS[1]: 2}}, 48),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CORNERS)
def test_a_corner_is_clipped_and_noised_as_a_whole(name: str, size: float, folder: Path) -> None:
    more, words, directive, trained = CORNERS[name]
    run = {**RUN, "num-supernodes": 3, **more}
    sites = [Site(folder / f"{own}.csv", folder / "model", {"profile": words} if words else {}) for own in ("with", "without")]
    message = order_of(run, folder / "model", words, directive, size)
    assert problems(message, run, *sites) == []
    served = sites[0].serve(message, run)
    assert not served.reason and served.steps[0].total.numel() == trained
    whole = Site(folder / "with.csv", folder / "model").serve(order_of(run, folder / "model", "", {}, 0.0), run)
    assert [(r.sigma, r.q, r.epsilon) for r in served.reserved] == [(r.sigma, r.q, r.epsilon) for r in whole.reserved]


@pytest.mark.parametrize(
    "ranks",
    [
        {LAYERS[0]: 0, LAYERS[1]: 1},
        {LAYERS[0]: 3, LAYERS[1]: 1},
        {LAYERS[0]: -1, LAYERS[1]: 1},
        {LAYERS[0]: True, LAYERS[1]: 1},
        {LAYERS[0]: 1.0, LAYERS[1]: 1},
        {LAYERS[0]: "1", LAYERS[1]: 1},
        {LAYERS[0]: 1},
        {LAYERS[0]: 1, LAYERS[1]: 1, "bert.encoder.layer.2.attention.self.query": 1},
        {LAYERS[0]: 10**30, LAYERS[1]: 1},
    ],
    ids=str,
)
def test_a_rank_that_a_layer_does_not_have_is_refused_and_counts_nothing(ranks: dict[str, Any], folder: Path) -> None:
    run = {**RUN, "strategy": "dynamic-rank", "num-supernodes": 3}
    message = order_of(run, folder / "model", "", {}, 0.0)
    told = TrainOrder(1, "", str(message.content.config_records[CONFIG]["model-digest"]), directive={"ranks": ranks})
    message.content[CONFIG] = told.to_record()
    served = Site(folder / "with.csv", folder / "model").serve(message, run)
    assert served.reason.startswith("order: its directive or its exchange") and not served.reserved and not served.steps
