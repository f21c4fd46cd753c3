"""Replies that break the contract are rejected and named; the others are merged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, MetricRecord, RecordDict

from lalora_flwr.engines.virtual_grid import FIRST_NODE
from lalora_flwr.wire.tensors import to_arrays
from tests.conftest import (
    Finished,
    Spy,
    factors_of,
    run_spied,
    small,
)
from tests.server.federations import LIES, a_nan, assert_equal, changed, first_array, lie, lying, mean_of, stopped
from tests.sites import servers_learner


@lie
def an_infinite_value(content: RecordDict) -> None:
    arrays, name = first_array(content)
    values = arrays[name].numpy().copy()
    values[-1, -1] = math.inf
    arrays[name] = Array(values)


@lie
def a_wrong_shape(content: RecordDict) -> None:
    arrays, name = first_array(content)
    arrays[name] = Array(arrays[name].numpy()[:1].copy())


@lie
def a_missing_tensor(content: RecordDict) -> None:
    arrays, name = first_array(content)
    del arrays[name]


@lie
def an_extra_record(content: RecordDict) -> None:
    content["loss"] = MetricRecord({"loss": 0.25})


@lie
def no_arrays(content: RecordDict) -> None:
    del content["arrays"]


@lie
def metrics_for_arrays(content: RecordDict) -> None:
    content["arrays"] = MetricRecord({"loss": 0.25})


@lie
def a_list_for_a_counter(content: RecordDict) -> None:
    content["counters"]["steps"] = [1, 2]


@lie
def no_number_for_a_counter(content: RecordDict) -> None:
    content["counters"]["steps"] = math.nan


@lie
def infinitely_many_steps(content: RecordDict) -> None:
    content["counters"]["steps"] = math.inf


@lie
def bytes_that_are_no_array(content: RecordDict) -> None:
    arrays, name = first_array(content)
    arrays[name].data = b"not an array"


@pytest.mark.parametrize("what", LIES)
def test_a_reply_that_breaks_the_contract_is_rejected_and_the_others_are_averaged(what: str, tmp_path: Path) -> None:
    spy = Spy(lying(1, LIES[what]))
    settings = small(tmp_path, num_rounds=1)
    run = Finished(run_spied(settings, spy), settings, spy)
    good = [pair for pair in spy.training(1) if pair[0].metadata.dst_node_id != FIRST_NODE + 1]
    assert len(good) == 2
    assert_equal(run.checkpoint, mean_of(good))
    (line,) = run.metrics
    assert (line["sites"], line["failures"]) == (2, 1)
    assert list(line["failed_sites"]) == ["1"] and line["failed_sites"]["1"].startswith("reply rejected: ")


@pytest.mark.parametrize(("factor", "problem"), [("A", "moved in a round in which it is frozen"), ("B", "did not move")])
def test_a_site_that_trained_other_factors_than_asked_is_rejected(factor: str, problem: str, tmp_path: Path) -> None:
    settings = small(tmp_path, num_rounds=1, lora__schedule="B")
    initial = to_arrays(servers_learner(settings).initial)

    def mistrain(content: RecordDict) -> None:
        arrays: Any = content["arrays"]
        for name in arrays:
            if factors_of([name]) == {factor}:
                arrays[name] = Array(initial[name].numpy() + np.float32(factor == "A"))

    run = Finished(run_spied(settings, spy := Spy(lying(1, mistrain))), settings, spy)
    (line,) = run.metrics
    assert list(line["failed_sites"]) == ["1"] and problem in line["failed_sites"]["1"]
    assert changed(servers_learner(settings).initial, run.checkpoint) == {"B"}


def test_a_liar_too_many_stops_the_run(tmp_path: Path) -> None:
    why = stopped(small(tmp_path, num_rounds=1, max_failures=0), Spy(lying(1, a_nan)))
    assert "1 of 3 sites failed" in why and "site 1: reply rejected: " in why
