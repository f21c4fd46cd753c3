"""Estimates of runs, with prices by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lalora_flwr.cost.estimate import PROCESS_BYTES, PROCESS_MESSAGE, Estimate, Estimator, Model
from lalora_flwr.cost.prices import KNOWN
from lalora_flwr.cost.trace import Operation
from lalora_flwr.settings import Settings, settings_from


@dataclass
class OneEach:
    """Ten microseconds for every matrix product, nothing for all else."""

    name: str = "made up"

    def of(self, operation: Operation) -> float:
        return 1e-5 * (operation.flops > 0)


def estimate(engine: str = "ray", workers: int = 1, **values: Any) -> Estimate:
    """With a clock that stands still: what is run here costs nothing but the least of a call."""
    given = {name.replace("__", ".").replace("_", "-"): value for name, value in values.items()}
    return Estimator(OneEach(), clock=lambda: 0.0).estimate(settings_from(given), engine, workers)


def site_seconds(found: Estimate, steps: int) -> float:
    return steps * (found.pass_seconds + found.release_seconds) + found.message_seconds


def test_a_round_is_steps_of_sites_in_turns_of_workers() -> None:
    for values, steps, turns, workers in (
        ({"num_supernodes": 4, "train__local_steps": 1}, 1, 4, 1),
        ({"num_supernodes": 4, "train__local_steps": 10}, 10, 4, 1),
        ({"num_supernodes": 4, "train__local_steps": 10}, 10, 2, 2),
        ({"num_supernodes": 8, "fraction_train": 0.5, "train__local_steps": 1}, 1, 4, 1),
        ({"num_supernodes": 2, "train__local_steps": 1}, 1, 1, 6),
    ):
        found = estimate(workers=workers, **values)
        assert found.pass_seconds > 1e-4
        assert found.round_seconds == pytest.approx(turns * site_seconds(found, steps) + found.server_seconds)
        assert found.run_seconds == pytest.approx(15 * found.round_seconds)


def test_real_sites_work_side_by_side() -> None:
    one, many = estimate("sites", num_supernodes=2), estimate("sites", num_supernodes=10)
    for found in (one, many):
        assert found.round_seconds == pytest.approx(site_seconds(found, 10) + found.server_seconds + PROCESS_MESSAGE)
    assert one.pass_seconds == many.pass_seconds and one.server_seconds < many.server_seconds


def test_parts_of_a_batch_are_passes_and_less_memory() -> None:
    whole, parts = (estimate(train__share_passes="off", train__max_physical_batch=most) for most in (0, 10))
    assert parts.pass_seconds == pytest.approx(4 * whole.pass_seconds)
    assert parts.worker_bytes < whole.worker_bytes


def test_gradients_at_two_points_are_two_passes() -> None:
    one, two = (estimate(strategy="dp-lora", filter__name=name) for name in ("disk", "kalman"))
    assert two.pass_seconds == pytest.approx(2 * one.pass_seconds) and two.worker_bytes == one.worker_bytes


def test_sites_of_one_process_share_passes() -> None:
    batch = {"train__batch_size": 10, "num_supernodes": 12}
    alone = estimate("sites", **batch).pass_seconds
    assert estimate("inline", **batch).pass_seconds == pytest.approx(alone / 12)
    assert estimate("ray", workers=3, **batch).pass_seconds == pytest.approx(alone / 4)
    assert estimate("inline", train__share_passes="off", **batch).pass_seconds == pytest.approx(alone)


def test_runs_too_short_to_find_out_share_none() -> None:
    batch = {"train__batch_size": 10, "num_supernodes": 12, "train__local_steps": 1}
    alone = estimate("sites", **batch).pass_seconds
    assert estimate("inline", num_rounds=16, **batch).pass_seconds == pytest.approx(alone)
    assert estimate("inline", num_rounds=17, **batch).pass_seconds == pytest.approx(alone / 12)


def test_a_step_of_b_and_a_step_of_a_both_count() -> None:
    both, b = estimate(strategy="dp-lora"), estimate(strategy="ffa-lora")
    turns = estimate(strategy="la-lora")
    assert b.pass_seconds < both.pass_seconds and b.pass_seconds <= turns.pass_seconds <= both.pass_seconds
    assert b.adapter_bytes == both.adapter_bytes == turns.adapter_bytes


def test_memory_holds_the_frozen_model_in_its_precision() -> None:
    full, half = estimate(), estimate(model__dtype="bfloat16")
    frozen = 158_490
    assert PROCESS_BYTES + 4 * frozen < full.worker_bytes < PROCESS_BYTES + 50e6
    assert full.worker_bytes - half.worker_bytes > frozen


def of_7_billion(**more: Any) -> Settings:
    return settings_from(
        {
            "model.name": "hf/meta-llama/Llama-2-7b-hf",
            "model.dtype": "bfloat16",
            "data.name": "hub:tatsu-lab/alpaca",
            "data.test": "hold-out:0.02",
            "data.text": "instruction",
            "data.response": "output",
            "data.records": 50_962,
            "data.max-tokens": 64,
            "train.batch-size": 4,
            "train.local-steps": 1,
            **more,
        }
    )


def test_a_model_of_7_billion_is_planned_without_its_weights() -> None:
    settings = of_7_billion()
    found = Estimator(KNOWN["h100"], clock=lambda: 0.0).estimate(settings, "sites")
    weights = 2 * 6.74e9
    assert weights < found.worker_bytes < weights + 3e9
    products = 4 * 64 * 2 * 6.6e9 * 2  # tokens, times parameters of its layers, forward and back
    assert found.pass_seconds > products / 989e12


def test_four_bits_hold_it_on_a_small_card() -> None:
    found = Estimator(KNOWN["l4"], clock=lambda: 0.0).estimate(of_7_billion(**{"model.dtype": "nf4"}), "sites")
    half = Estimator(KNOWN["l4"], clock=lambda: 0.0).estimate(of_7_billion(), "sites")
    layers, rest = 6.476e9, 0.262e9  # parameters
    held = layers * (1 / 2 + 4 / 64) + 2 * rest
    assert held < found.worker_bytes < held + 3e9
    assert half.worker_bytes - found.worker_bytes == pytest.approx(layers * (2 - 1 / 2 - 4 / 64), rel=0.1)
    assert found.pass_seconds > half.pass_seconds  # a weight is made anew for each product


def test_texts_are_as_long_as_they_are_said_to_be() -> None:
    model = Model.of(of_7_billion(), torch.bfloat16)
    short, middle, long = (model.traced(model.layout.names, 2, tokens).flops for tokens in (6, 12, 24))
    assert middle == pytest.approx(2 * short, rel=0.01) and long == pytest.approx(2 * middle, rel=0.01)


def test_no_text_is_longer_than_the_model_has_positions_for() -> None:
    long = of_7_billion(**{"data.max-tokens": 100_000, "train.batch-size": 1})
    assert Estimator(KNOWN["h100"], clock=lambda: 0.0).estimate(long, "sites").tokens == 4096
