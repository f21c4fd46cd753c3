"""``lalora plan --cost``."""

from __future__ import annotations

import pytest

from lalora_flwr.cli.plan_cost import cost_of, memory_advice, size, span
from lalora_flwr.cost.estimate import Estimate
from lalora_flwr.settings import settings_from
from tests.cli.commands import Lalora, assert_one_line


def test_a_plan_with_its_cost_says_time_and_memory(lalora: Lalora) -> None:
    code, out, err = lalora("plan", "--cost", "--engine", "inline", "-c", "train.local-steps=2")
    assert (code, err) == (0, "")
    said = " ".join(out.split())
    assert "a round" in said and "for 15, without start and evaluations (this machine, the inline engine)" in said
    assert "MB for each process that trains" in said or "GB for each process that trains" in said
    assert "without start" not in lalora("plan")[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engine", "gpu"], "--engine gpu: must be one of ray, inline, sites"),
        (["--hardware", "tpu"], "--hardware tpu: must be one of this-machine, h100, a100, l4"),
        (["--tokens", "-1"], "--tokens -1: must be the tokens of a usual text"),
        (["--tokens", "129"], "--tokens 129: texts are cut to data.max-tokens = 128"),
    ],
)
def test_what_no_estimate_can_be_made_for_is_refused_in_one_line(lalora: Lalora, options: list[str], said: str) -> None:
    assert_one_line(lalora("plan", "--cost", *options), said)


@pytest.mark.parametrize("options", [["--engine", "inline"], ["--hardware", "tpu"], ["--tokens", "20"]])
def test_options_of_the_cost_alone_do_nothing_in_silence(lalora: Lalora, options: list[str]) -> None:
    assert_one_line(lalora("plan", *options), "--engine, --hardware, --tokens: say what --cost predicts; add it")


def test_a_batch_is_no_larger_than_a_sites_records() -> None:
    given = settings_from({"train.batch-size": 100_000})
    large, all_records = (cost_of(keys, "ray", "h100", 0, 50) for keys in (given, settings_from({"train.batch-size": 50})))
    assert large.worker_bytes == all_records.worker_bytes


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(2e-6, "2 µs"), (0.0123, "12.3 ms"), (61.2, "61.2 s"), (600, "10 min"), (36_000, "10 h"), (864_000, "10 days")],
)
def test_times_are_said_as_people_do(seconds: float, said: str) -> None:
    assert span(seconds) == said


def test_a_step_that_does_not_fit_is_told_with_what_to_do() -> None:
    needs = Estimate("h100", 0, 1, 1, 1, 1, 1, 1, worker_bytes=90e9, adapter_bytes=1)
    assert "needs 90 GB, and there are 80 GB: lower train.max-physical-batch" in memory_advice(needs, 80e9)
    assert not memory_advice(needs, 100e9) and not memory_advice(needs, 0)
    assert size(1.5e9) == "1.5 GB" and size(12) == "12 bytes"
