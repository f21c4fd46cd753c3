"""The running average of released adapters: its weights, and that a run evaluates, saves and reports it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lalora_flwr.methods.averages import RunningAverage
from lalora_flwr.methods.dp_lora import METHOD
from lalora_flwr.methods.merges import Mean, Memory, Merged, Now
from lalora_flwr.methods.updates import Tensors, Updates
from lalora_flwr.server.folder import MORE
from lalora_flwr.settings.choices import METHODS
from tests.conftest import Finished, Spy, arrays_of, run_spied, small

EMA = {"merge__average": "ema", "num_rounds": 8, "strategy": "dp-lora"}


def naive(values: list[float], rounds: int) -> float:
    """By the weights themselves: each round's is the decay to the power of its age."""
    decay = max(0.0, 1 - 4 / max(4, rounds))
    weights = [decay ** (len(values) - 1 - i) for i in range(len(values))]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=30), st.integers(1, 200))
def test_weights_fall_with_age_and_sum_to_one(values: list[float], rounds: int) -> None:
    average = RunningAverage(rounds)
    for value in values:
        average.add({"x": np.full((2, 3), value, np.float32)})
    want = naive([float(np.float32(value)) for value in values], rounds)
    assert average.value()["x"].dtype == np.float32
    np.testing.assert_allclose(average.value()["x"], np.full((2, 3), want), rtol=1e-5, atol=1e-6)


def test_it_starts_anew_where_the_adapter_is_rewritten_and_goes_on_from_its_state() -> None:
    average = RunningAverage(100)
    average.add({"x": np.ones(2, np.float32)})
    average.forget()
    assert average.value() == {}
    average.add({"x": np.full(2, 3, np.float32)})
    assert average.value()["x"].tolist() == [3, 3]
    other = RunningAverage(100)
    other.restore(*average.state())
    for one in (average, other):
        one.add({"x": np.zeros(2, np.float32)})
    assert average.value()["x"].tolist() == other.value()["x"].tolist() != [3, 3]


def released(run: Finished) -> list[dict[str, np.ndarray]]:
    """The adapter after each round: what the next one starts from, and the checkpoint's after the last."""
    starts = [arrays_of(run.spy.training(number)[0][0]) for number in range(2, run.settings.num_rounds + 1)]
    last = {name: value.numpy() for name, value in run.checkpoint.items() if not name.startswith(MORE)}
    return [{name: np.asarray(value) for name, value in start.items()} for start in starts] + [last]


def test_a_run_saves_and_reports_the_average_and_trains_on_from_the_last(tmp_path: Path) -> None:
    settings = small(tmp_path, **EMA)
    run = Finished(run_spied(settings, spy := Spy()), settings, spy)
    plain = small(tmp_path, run_name="plain", **{**EMA, "merge__average": "last"})
    last = Finished(run_spied(plain, other := Spy()), plain, other)
    for name, value in last.checkpoint.items():
        assert torch.equal(run.checkpoint[name], value)  # the same training
    adapters = released(run)
    for name in adapters[0]:
        want = naive([adapter[name].astype(np.float64) for adapter in adapters], 8)  # type: ignore[misc]
        saved = load_file(run.path / "adapter" / "adapter_model.safetensors")
        peft = name.replace(".default", "")
        if peft in saved:
            np.testing.assert_allclose(saved[peft].numpy(), want, rtol=1e-5, atol=1e-7)
    assert run.summary["last_accuracy"] == last.summary["accuracy"] and run.summary["last_loss"] == last.summary["loss"]
    assert run.summary["accuracy"] == run.metrics[-1]["accuracy"] and run.summary["loss"] != last.summary["loss"]
    assert "last_accuracy" not in last.summary and run.summary["frozen_accuracy"] == last.summary["frozen_accuracy"]


def test_sites_evaluate_the_adapter_that_is_saved(tmp_path: Path) -> None:
    settings = small(tmp_path, evaluate_sites=True, **EMA)
    run = Finished(run_spied(settings, spy := Spy()), settings, spy)
    saved = load_file(run.path / "adapter" / "adapter_model.safetensors")
    asked = [sent for sent, _ in spy.exchange if sent.metadata.message_type == "evaluate"]
    last = {name.replace(".default", ""): np.asarray(value) for name, value in arrays_of(asked[-1]).items()}
    compared = set(saved) & set(last)
    assert compared and all(np.array_equal(saved[name].numpy(), last[name]) for name in compared)
    assert any(not np.array_equal(last[name.replace(".default", "")], value) for name, value in released(run)[-1].items())


class Rewriting(Mean):
    """Says of every round that it wrote the adapter anew."""

    name = "rewriting"

    def __call__(self, current: Tensors, updates: Updates, memory: Memory, now: Now) -> Merged:
        return dataclasses.replace(super().__call__(current, updates, memory, now), rewritten=True)


def test_no_average_goes_across_a_rewriting(tmp_path: Path) -> None:
    METHODS.register("rewriting-lora", dataclasses.replace(METHOD, merge=Rewriting(), average=True))
    settings = small(tmp_path, **{**EMA, "strategy": "rewriting-lora", "merge__average": "auto"})
    run = Finished(run_spied(settings, spy := Spy()), settings, spy)
    assert run.summary["last_loss"] == pytest.approx(run.summary["loss"])  # the average is of the last round alone
