"""Noise in both factors against noise that is drawn, and cosines without noise against updates that had none."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from lalora_flwr.adapter.slots import LORA_A, LORA_B, Layout, Slot
from lalora_flwr.diagnose.noise import Amplification, amplification, noise_of_run
from lalora_flwr.diagnose.updates import clean_cosine, cost, released, without_signals
from lalora_flwr.methods.filters import Around
from lalora_flwr.methods.method import method_of
from lalora_flwr.server.metrics import RoundMetrics, SiteReport, Summary
from lalora_flwr.settings import Settings, settings_from

LAYERS = {"one": (3, 24, 5), "two": (2, 16, 5)}  # rank, inputs, outputs: unequal, so that A and B cannot be exchanged
LAYOUT = Layout(
    slot
    for name, (r, n, m) in LAYERS.items()
    for slot in (Slot(f"{name}.A", name, LORA_A, (r, n), 1), Slot(f"{name}.B", name, LORA_B, (m, r), 0))
)
ADAPTER = {
    name: (3.0 if slot.part == LORA_B else 1.0) * torch.randn(slot.shape, generator=torch.Generator().manual_seed(7))
    for name, slot in LAYOUT.items()
}
SUMMARY = Summary(sites={str(i): SiteReport(noise_multiplier=2.0) for i in range(4)})


def settings(**keys: Any) -> Settings:
    some = {"train.lr": 0.5, "num-supernodes": 4, "num-rounds": 2, "train.local-steps": 2, "lora.rank": 2, "lora.alpha": 6.0}
    return settings_from({**some, **keys})


def of(run: Settings) -> Amplification:
    return amplification(run, method_of(run), LAYOUT, SUMMARY, ADAPTER)


@pytest.mark.parametrize(
    ("strategy", "filter", "twice"),
    [("dp-lora", "none", "step round run"), ("dp-lora", "gauss5", "step round run"), ("la-lora", "gauss5", "round run")],
)
def test_noise_in_both_factors_is_that_of_noise_that_is_drawn(strategy: str, filter: str, twice: str) -> None:
    run = settings(strategy=strategy, **{"filter.name": filter})
    method, found, generator = method_of(run), of(run), torch.Generator().manual_seed(1)
    nu, scale, draws = noise_of_run(run, SUMMARY), 3.0, 300
    sums = {(span, kind): 0.0 for span in ("step", "round", "run") for kind in ("product", "linear")}

    def add(span: str, noise: dict[str, torch.Tensor], share: float) -> None:
        for layer in LAYERS:
            A, B, a, b = (
                t.double() for t in (ADAPTER[f"{layer}.A"], ADAPTER[f"{layer}.B"], noise[f"{layer}.A"], noise[f"{layer}.B"])
            )
            sums[span, "product"] += share * float((scale * b @ a).square().sum())
            sums[span, "linear"] += share * float((scale * (B @ a + b @ A)).square().sum())

    def nothing() -> dict[str, torch.Tensor]:
        return {name: torch.zeros(slot.shape) for name, slot in LAYOUT.items()}

    for _ in range(draws):
        whole = nothing()
        for server_round in (1, 2):
            in_round = nothing()
            for step in range(2):
                in_step = nothing()
                for name in method.schedule.mask(LAYOUT, server_round, step, {}):
                    drawn = nu * torch.randn(LAYOUT[name].shape, generator=generator)
                    in_step[name] = 0.5 * method.filter(LAYOUT[name], drawn, {}, Around())
                    in_round[name] += in_step[name]
                    whole[name] += in_step[name]
                add("step", in_step, 1 / 4 / draws)
            add("round", in_round, 1 / 2 / draws)
        add("run", whole, 1 / draws)
    assert found.whole is not None
    for span in ("step", "round", "run"):
        assert found.whole.linear[span] == pytest.approx(math.sqrt(sums[span, "linear"]), rel=0.08)
        assert found.whole.product[span] == pytest.approx(math.sqrt(sums[span, "product"]), rel=0.08)
        assert bool(found.whole.product[span]) == (span in twice)


def test_one_factor_a_round_meets_itself_only_over_the_run_and_one_factor_never() -> None:
    both, one = of(settings(strategy="rolora")).whole, of(settings(strategy="ffa-lora")).whole
    assert both is not None and one is not None
    assert both.product["step"] == both.product["round"] == 0 < both.product["run"]
    assert one.product == {"step": 0, "round": 0, "run": 0} and one.linear["run"] > one.linear["step"] > 0


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"privacy.epsilon": math.inf}, "no noise"),
        ({"train.optimizer": "adamw"}, "train.optimizer = 'adamw'"),
        ({"train.local-steps": 1, "train.step-at": "server", "train.momentum": 0.5}, "train.momentum = 0.5"),
        ({"strategy": "as-lora"}, "merge.name = 'as-lora': what trains when follows from directives"),
        ({"strategy": "dynamic-rank"}, "merge.name = 'above-noise': what trains when follows from directives"),
        ({"strategy": "hetlora", "profiles": "rank=1;layers=1"}, "sites may train different parts"),
        ({"strategy": "flora"}, "merge.name = 'stack': the noise of a round is turned into other factors"),
    ],
)
def test_where_the_noise_is_not_known_the_reason_is_said(keys: dict[str, Any], why: str) -> None:
    found = of(settings(**keys))
    assert found.whole is None and why in found.unknown


def test_factors_that_are_frozen_get_no_noise() -> None:
    run = settings(strategy="fed-sb")
    frozen = Layout(dataclasses.replace(slot, frozen=True) for slot in LAYOUT.values())
    found = amplification(run, method_of(run), frozen, SUMMARY, ADAPTER)
    assert found.whole is None and "no factors A and B that train" in found.unknown


def test_the_noise_of_a_mean_is_that_of_its_sites() -> None:
    run = settings()
    assert noise_of_run(run, SUMMARY) == pytest.approx(2.0 * run.privacy.clip_norm / run.train.batch_size / 2)
    shared = settings(trust="secure-sum", **{"train.local-steps": 1})
    assert noise_of_run(shared, SUMMARY) == pytest.approx(
        2.0 * shared.privacy.clip_norm / shared.train.batch_size / 4 * math.sqrt(4 / 3), rel=2e-3
    )


def test_a_clean_cosine_is_that_of_the_updates_before_their_noise() -> None:
    rng, sites, size, noise, rounds = np.random.default_rng(0), 4, 4000, 1.0, []
    common = rng.standard_normal(size)
    clean = [0.2 * (common + rng.standard_normal(size)) for _ in range(sites)]
    pairs = [clean[i] @ clean[j] for i in range(sites) for j in range(i)]
    for _ in range(200):
        sent = [u + noise * rng.standard_normal(size) for u in clean]
        own = np.mean([u @ u for u in sent])
        cosine = np.mean([sent[i] @ sent[j] for i in range(sites) for j in range(i)]) / own
        energy = noise**2 * size / sites
        rounds.append((float(cosine), float((np.square(np.mean(sent, axis=0)).sum() - energy) / energy), sites))
    found = clean_cosine(rounds)
    assert (
        found == pytest.approx(np.mean(pairs) / np.mean([u @ u for u in clean]), rel=0.05)
        and np.mean([r[0] for r in rounds]) < 0.1
    )


def test_what_noise_hides_has_no_clean_cosine() -> None:
    rng = np.random.default_rng(0)
    assert clean_cosine([(float(c), float(s), 4) for c, s in 0.01 * rng.standard_normal((40, 2))]) is None
    assert clean_cosine([(0.5, 0.5, 4)]) is None and clean_cosine([(None, 0.5, 4), (0.5, None, 4)]) is None


def test_means_and_costs_over_the_rounds() -> None:
    lines = [
        RoundMetrics(round=i, snr=s, seconds=t, bytes_up=10 * i) for i, s, t in ((1, 1.0, 9.0), (2, None, 1.0), (3, 3.0, 2.0))
    ]
    assert released(lines).snr == 2.0 and not without_signals(lines)
    found = cost(lines, 77.0)
    assert (found.seconds, found.bytes_up, found.peak_memory_mb) == (2.0, 20.0, 77.0)
    assert cost([dataclasses.replace(lines[0], peak_memory_mb=5.0)], 77.0).peak_memory_mb == 5.0
    assert without_signals([RoundMetrics(round=1)])


def test_numbers_that_are_not_finite_are_left_out() -> None:
    lines = [
        RoundMetrics(round=i, sites=4, snr_A=s, cosine_A=0.5) for i, s in enumerate((4.0, math.inf, math.nan, 5.0, -math.inf))
    ]
    finite = [lines[0], lines[3]]
    assert released(lines) == released(finite) and released(finite).clean_cosine_A is not None
