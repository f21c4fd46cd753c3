"""FedSA-LoRA: A is the mean of the sites', each B stays where it was trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lalora_flwr.adapter.slots import HEAD, LORA_A, LORA_B, Layout
from lalora_flwr.engines.inline import run_inline
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.privacy.noise import mechanism_for
from lalora_flwr.privacy.randomness import SeededRandom
from lalora_flwr.server.plan import make_plan
from lalora_flwr.settings import Settings
from lalora_flwr.site.records import RecordStore
from lalora_flwr.training.evaluate import evaluate
from lalora_flwr.training.learner import Learner
from tests.conftest import MODELS, Finished, arrays_of, small
from tests.server.test_outputs import public_test_part
from tests.server.test_resume import killed_after, result, resumed
from tests.sites import servers_learner

FEDSA: dict[str, Any] = {"strategy": "fedsa-lora", "num_rounds": 3}
TWO: dict[str, Any] = {**FEDSA, "num_supernodes": 2, "lora__head": "trained"}


def own_of(learner: Learner) -> frozenset[str]:
    return learner.adapter.layout.of(LORA_B, HEAD)


def naive_round(
    learner: Learner, settings: Settings, site: int, server_round: int, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The paper's local loop with DP-SGD: one record after the other, both factors in one vector; float64 but for the model."""
    place = {"partition-id": site, "num-partitions": settings.num_supernodes}
    records = RecordStore()(settings, place, learner.base)
    mechanism, source = mechanism_for(settings, len(records)), SeededRandom(settings.seed, site, server_round)
    weights = {name: state[name].double() for name in learner.adapter.layout}
    for _ in range(settings.train.local_steps):
        learner.adapter.load({name: value.float() for name, value in weights.items()})
        learner.adapter.activate(learner.adapter.trainable)
        chosen = torch.nonzero(source.uniform(len(records)) < mechanism.sample_rate).flatten()
        total = {name: torch.zeros_like(value) for name, value in weights.items()}
        for j in chosen:
            x, y = records.batch(j[None])
            own = list(learner.adapter.parameters.values())
            found = torch.autograd.grad(nn.functional.cross_entropy(learner.adapter.model(x), y), own)
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in found))
            for name, g in zip(learner.adapter.parameters, found, strict=True):
                total[name] += g.double() * min(1.0, mechanism.clip_norm / norm)
        for name, value in weights.items():
            noise = source.normal(value.shape) * mechanism.noise_multiplier * mechanism.clip_norm
            source.normal(value.shape)  # the draw that only decides on which side of the grid a sum falls
            value -= settings.train.lr * (total[name] + noise) / mechanism.expected_batch
    return {name: value.float() for name, value in weights.items()}


def test_three_rounds_of_two_sites_are_the_papers(finished: Callable[..., Finished]) -> None:
    done = finished(**TWO)
    learner = MODELS.learner(done.settings)
    kept, shared = own_of(learner), learner.adapter.layout.of(LORA_A)
    common = dict(learner.initial)
    own = [{name: learner.initial[name] for name in kept} for _ in range(2)]
    for server_round in (1, 2, 3):
        trained = [naive_round(learner, done.settings, site, server_round, {**common, **own[site]}) for site in range(2)]
        for site, (order, reply) in enumerate(done.spy.training(server_round)):
            assert arrays_of(order).keys() == arrays_of(reply).keys() == shared
            for name, value in arrays_of(reply).items():
                torch.testing.assert_close(value, trained[site][name], atol=2e-5, rtol=0)
            stayed = reply.content["memory"].to_torch_state_dict()  # type: ignore[union-attr]
            own[site] = {name: trained[site][name] for name in kept}
            for name in kept:
                torch.testing.assert_close(stayed[name], own[site][name], atol=2e-5, rtol=0)
        common |= {name: (trained[0][name] + trained[1][name]) / 2 for name in shared}
    for name, value in common.items():
        torch.testing.assert_close(done.checkpoint[name], value, atol=2e-5, rtol=0)
    assert max(float((own[0][name] - own[1][name]).abs().max()) for name in kept) > 0.01


def test_what_the_server_holds_is_the_frozen_model_and_the_sites_own_are_better(finished: Callable[..., Finished]) -> None:
    done = finished(**FEDSA)
    summary, learner = done.summary, MODELS.learner(done.settings)
    assert summary["loss"] == summary["frozen_loss"] and summary["accuracy"] == summary["frozen_accuracy"]
    assert not any(done.checkpoint[name].any() for name in learner.adapter.layout.of(LORA_B))
    found = []
    for _, reply in done.spy.training(3):
        own = reply.content["memory"].to_torch_state_dict()  # type: ignore[union-attr]
        learner.adapter.load({**{n: done.checkpoint[n] for n in learner.adapter.layout}, **own})
        with torch.inference_mode():
            images, labels = public_test_part()
            found.append(float((learner.adapter.model.eval()(images).argmax(-1) == labels).float().mean()))
    assert summary["personal_accuracy"] == pytest.approx(sum(found) / 3, abs=1e-6)
    assert summary["personal_accuracy"] > summary["frozen_accuracy"] + 0.05
    assert "simulation only" in summary["personal_is"]
    assert "kept `lora_B` of its own" in (done.path / "adapter" / "README.md").read_text()


def test_a_method_that_shares_everything_says_nothing_of_personal_models(finished: Callable[..., Finished]) -> None:
    assert not [name for name in finished().summary if name.startswith("personal")]


@pytest.mark.parametrize("drawn", [1.0, 0.5])
@pytest.mark.parametrize("filter", ["none", "disk"])
def test_it_goes_on_after_a_death(drawn: float, filter: str, tmp_path: Path, finished: Callable[..., Finished]) -> None:
    more = {**FEDSA, "num_supernodes": 4, "fraction_train": drawn, "filter__name": filter}
    killed_after(small(tmp_path, **more), 2)
    run_inline(resumed(tmp_path, **more))
    assert result(tmp_path / "run") == result(finished(**more).path)


def test_sites_evaluate_their_own_models(finished: Callable[..., Finished]) -> None:
    done = finished(**FEDSA, evaluate_sites=True)
    learner, found = MODELS.learner(done.settings), []
    for site, (_, reply) in enumerate(done.spy.training(3)):
        own = reply.content["memory"].to_torch_state_dict()  # type: ignore[union-attr]
        learner.adapter.load({**{n: done.checkpoint[n] for n in learner.adapter.layout}, **own})
        records = RecordStore()(done.settings, {"partition-id": site, "num-partitions": 3}, learner.base)
        found.append(evaluate(learner, records)["accuracy"])
    assert done.metrics[-1]["site_accuracy"] == pytest.approx(sum(found) / 3, abs=1e-6)


def test_sharing_a_alone_goes_with_other_schedules_filters_and_merges(finished: Callable[..., Finished]) -> None:
    done = finished(strategy="la-lora", merge__travel="share-a", merge__name="median", num_rounds=2)
    layout = servers_learner(done.settings).adapter.layout
    for order, reply in done.spy.training(2):
        assert arrays_of(order).keys() == arrays_of(reply).keys() == layout.of(LORA_A)
    assert done.summary["personal_accuracy"] != done.summary["accuracy"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a secure sum of several steps": ({"trust": "secure-sum"}, "train.local-steps = 2: must be 1"),
    "a merge of both factors": ({"merge__name": "product-svd"}, "combines lora_B, which stays at the sites"),
    "another travel": ({"merge__travel": "everything"}, "which shares A alone"),
    "an average": ({"merge__average": "ema"}, "no adapter to average"),
    "a ridge head": ({"lora__head": "ridge"}, "take the place of the one released"),
    "an earlier adapter": ({"lora__start_from": "elsewhere"}, "would not start from it"),
    "a form without B": (
        {"lora__form": "bitfit", "lora__rank": 4, "lora__alpha": 8.0, "lora__targets": "auto"},
        "trains no lora_B",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    overrides, reason = REFUSED[case]
    with pytest.raises(ConfigError, match=reason):
        small(tmp_path, **{**FEDSA, **overrides})


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"lora__schedule": "B"}, "round 1 trains nothing that leaves the sites"),
        ({"lora__schedule": "round:AB"}, "round 2 trains nothing that leaves the sites"),
        ({"lora__schedule": "A"}, "no step of the run trains lora_B"),
        ({"lora__form": "lora-sb"}, "trains no lora_B that could stay"),
    ],
)
def test_rounds_that_send_nothing_are_refused(overrides: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_plan(small(tmp_path, **{**FEDSA, **overrides}))


def test_the_plan_counts_half_of_the_bytes(tmp_path: Path) -> None:
    plan, layout = make_plan(small(tmp_path, **FEDSA)), Layout(servers_learner(small(tmp_path, **FEDSA)).adapter.layout.values())
    expected = sum(128 + 4 * math.prod(slot.shape) for slot in layout.only(layout.of(LORA_A)).values())
    assert plan.bytes_down == expected and plan.bytes_up == (expected, expected)
