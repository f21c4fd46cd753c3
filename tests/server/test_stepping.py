"""Where the server takes the step: sites send gradients, and optimizer, filter and rate go on from round to round."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict
from safetensors.torch import load_file
from torch import Tensor, nn

from lalora_flwr.adapter.slots import LORA_A, LORA_B, Layout, Slot
from lalora_flwr.engines.inline import run_inline
from lalora_flwr.methods.filters import Around, Filter, Nothing, State
from lalora_flwr.methods.method import method_of
from lalora_flwr.server.stepping import ServerStep
from tests.adapters import factor_of
from tests.conftest import Finished, Spy, arrays_of, factors_of, run_spied, small
from tests.server.federations import lying, stopped
from tests.server.test_resume import killed_after, result, resumed

MakeFinished = Callable[..., Finished]
ONE: dict[str, Any] = {"train__local_steps": 1, "num_rounds": 4}
SERVER: dict[str, Any] = {**ONE, "train__step_at": "server"}
LAYOUT = Layout([Slot("a", "x", LORA_A, (2, 3), 1), Slot("b", "x", LORA_B, (3, 2), 0)])


def adapter(done: Finished) -> dict[str, Tensor]:
    return load_file(done.path / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("strategy", ["la-lora", "dp-lora", "ffa-lora", "rolora"])
def test_it_is_the_step_that_sites_take_where_nothing_is_remembered(strategy: str, finished: MakeFinished) -> None:
    own, servers = (adapter(finished(strategy=strategy, **how)) for how in (ONE, SERVER))
    assert own.keys() == servers.keys()
    for name in own:
        torch.testing.assert_close(servers[name], own[name], rtol=0, atol=1e-6)


def test_with_one_step_a_round_alternation_is_by_round_and_methods_coincide(finished: MakeFinished) -> None:
    """RoLoRA is LA-LoRA without its filter; both train B in round 1 and A in round 2."""
    la, ro = (finished(strategy=strategy, filter__name="none", **SERVER) for strategy in ("la-lora", "rolora"))
    for name, value in adapter(la).items():
        assert torch.equal(value, adapter(ro)[name])
    for done in (la, ro):
        sent = [factors_of(arrays_of(done.spy.training(server_round)[0][1])) for server_round in (1, 2, 3)]
        assert sent == [{"B"}, {"A"}, {"B"}]
    assert method_of(la.settings).schedule.text == "round:BA"


class Twice(Filter):
    """Adds up what it saw."""

    name = "twice"
    remembers = True

    def __call__(self, slot: Slot, gradient: Tensor, state: State, around: Around) -> Tensor:
        state["seen"] = state.get("seen", torch.zeros_like(gradient)) + gradient
        return state["seen"]


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("filter", [Nothing(), Twice()], ids=lambda f: f.name)
def test_optimizer_and_filter_are_those_of_one_training(optimizer: str, filter: Filter, tmp_path: Path) -> None:
    """Against torch's optimizer over all rounds; half way the server is another one that restored."""
    name = "adamw" if optimizer == "adamw" else "sgd"
    momentum = 0.9 if optimizer == "momentum" else 0.0
    keys = {"train__optimizer": name, "train__momentum": momentum, "train__weight_decay": 0.1, "train__decay": "linear"}
    settings = small(tmp_path, **{**SERVER, "num_rounds": 6}, **keys)
    draw = torch.Generator().manual_seed(1)
    naive = {n: nn.Parameter(torch.randn(slot.shape, generator=draw)) for n, slot in LAYOUT.items()}
    make = torch.optim.AdamW if name == "adamw" else torch.optim.SGD
    oracle: Any = make(naive.values(), lr=1.0, weight_decay=0.1, **({"momentum": momentum} if name == "sgd" else {}))
    seen = {n: torch.zeros(slot.shape) for n, slot in LAYOUT.items()}
    method = dataclasses.replace(method_of(settings), filter=filter)
    step = ServerStep(settings, LAYOUT, method)
    current = {n: p.detach().numpy().copy() for n, p in naive.items()}
    for server_round in range(1, 7):
        trains = ["b", "a"][server_round % 2 :][:1] if server_round < 5 else ["a", "b"]
        gradients = {n: torch.randn(LAYOUT[n].shape, generator=draw) for n in trains}
        for n, p in naive.items():
            p.grad = None
            if n in gradients:
                seen[n] += gradients[n]
                p.grad = seen[n].clone() if filter.remembers else gradients[n]
        oracle.param_groups[0]["lr"] = settings.train.lr * (1 - (server_round - 1) / 6)
        oracle.step()
        before = dict(current)
        current |= step(server_round, current, {n: g.numpy() for n, g in gradients.items()}, noise=0.1)
        for n, p in naive.items():
            np.testing.assert_allclose(current[n], p.detach().numpy(), rtol=1e-6, atol=1e-7)
            assert (n in trains) != np.array_equal(current[n], before[n])
        kept = {n: t.clone() for n, t in step.tensors().items()}
        step = ServerStep(settings, LAYOUT, method)
        step.restore(kept)


REMEMBERING = {**SERVER, "train__momentum": 0.9, "merge__average": "ema", "train__decay": "linear", "num_rounds": 5}


def test_a_resumed_run_ends_like_one_that_was_never_stopped(tmp_path: Path, finished: MakeFinished) -> None:
    killed_after(small(tmp_path, **REMEMBERING), 3)
    assert result(run_inline(resumed(tmp_path, **REMEMBERING))) == result(finished(**REMEMBERING).path)


def test_momentum_changes_the_result(finished: MakeFinished) -> None:
    one, other = (adapter(finished(**SERVER, train__momentum=m)) for m in (0.0, 0.9))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_what_travels_up_is_what_trained(finished: MakeFinished) -> None:
    done = finished(strategy="dp-lora", **SERVER)
    for order, reply in done.spy.training(1):
        assert arrays_of(reply).keys() == arrays_of(order).keys()
        assert all(bool(value.any()) for value in arrays_of(reply).values())


def test_a_gradient_without_noise_is_rejected(tmp_path: Path) -> None:
    def nothing(content: RecordDict) -> None:
        arrays: Any = content["arrays"]
        content["arrays"] = ArrayRecord({name: torch.zeros(arrays[name].shape) for name in arrays})

    assert "is zero, so that it has no noise" in stopped(small(tmp_path, max_failures=0, **SERVER), Spy(lying(1, nothing)))


def test_a_long_gradient_is_scaled_down_to_the_runs_bound(tmp_path: Path) -> None:
    def long(content: RecordDict) -> None:
        arrays: Any = content["arrays"]
        content["arrays"] = ArrayRecord({name: torch.full(arrays[name].shape, 100.0) for name in arrays})

    changed: dict[str, Any] = {**SERVER, "num_rounds": 1, "merge__max_update_norm": 0.1, "train__lr": 1.0, "filter__name": "none"}
    settings, spy = small(tmp_path, **changed), Spy(lying(1, long))
    done = Finished(run_spied(settings, spy), settings, spy)
    start, end = arrays_of(spy.training(1)[0][0]), done.checkpoint
    moved = torch.cat([(end[name] - start[name]).flatten() for name in sorted(start) if factor_of(name) == "B"])
    assert 0 < float(moved.norm()) <= 0.1 + 1e-6


def test_an_adapter_that_runs_away_stops_the_run_and_names_the_rate(tmp_path: Path) -> None:
    why = stopped(small(tmp_path, **{**SERVER, "train__lr": 1e4, "privacy__clip_norm": 100.0}), Spy())
    assert why.startswith("round 1: the adapter holds values above 10000; choose a smaller train.lr")
