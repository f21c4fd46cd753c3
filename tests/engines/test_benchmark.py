"""The benchmark of simulations: one job for all engines, and a check that notices other work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.clocks import BEGUN, Marks
from benchmarks.job import Job, LocalTraining, cohort_of, mean, settings_of
from benchmarks.same_work import TOLERANCE, checked
from lalora_flwr.training.learner import ModelStore

JOB = Job(sites=12, cohort=3, steps=2, batch=4, rounds=2)


def test_a_site_draws_the_same_in_any_order_and_process() -> None:
    training = LocalTraining(JOB)
    start, ends = training.adapter.state(), {}
    for sites in ((5, 7), (7, 5)):
        for site in sites:
            training.adapter.load(start)
            training.train(1, site)
            ends[sites, site] = training.adapter.state()
    for site in (5, 7):
        first, second = ends[(5, 7), site], ends[(7, 5), site]
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(ends[(5, 7), 5][name], ends[(5, 7), 7][name]) for name in start)


def test_cohorts_are_of_the_asked_size_without_repeats() -> None:
    drawn = [cohort_of(JOB, server_round) for server_round in range(5)]
    assert all(len(set(sites)) == 3 and max(sites) < 12 for sites in drawn)
    assert len({tuple(sites) for sites in drawn}) > 1
    assert cohort_of(replace(JOB, cohort=12), 3) == list(range(12))


def test_a_job_survives_its_text() -> None:
    unclipped = replace(JOB, clip=float("inf"))
    assert Job.of(unclipped.text()) == unclipped


@pytest.mark.parametrize(("off", "same"), [(0.0, True), (1e-3, False)])
def test_other_work_is_noticed(off: float, same: bool) -> None:
    initial = ModelStore().learner(settings_of(JOB, "unused")).initial

    def run(variant: str, text: str, pythons: Mapping[str, str], path: str) -> None:
        moved = 1.0 if variant == "bare" else 1.0 + off
        save_file({name: value + moved for name, value in initial.items()}, path)

    ((name, difference),) = checked(JOB, ["pfl"], {}, run)
    assert name == "pfl" and (difference <= TOLERANCE) == same


@pytest.mark.parametrize(("late", "cpu", "wall"), [(False, 1.75, 3.0), (True, 2.5, 4.5)])
def test_the_clocks_leave_out_the_first_half_and_the_last_round(
    late: bool, cpu: float, wall: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BEGUN, "4")
    marks = Marks(6, late=late)
    for _ in range(6):
        marks()
    assert marks.ended and len(marks.at) == 6
    marks.at = [(0.0, 10.0), (0.1, 11.0), (2.0, 12.0), (3.0, 13.5), (7.0, 21.0), (90.0, 90.0)]
    assert marks.numbers() == {"cpu": cpu, "wall": wall, "start": 6.0}


def test_the_mean_is_that_of_each_tensor() -> None:
    assert mean([{"a": torch.zeros(2)}, {"a": torch.full((2,), 2.0)}])["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "wrong", [("--peer", "pfl=nowhere"), ("--peer", "tff=python"), ("--cohort", "6", "--sites", "5"), ("--variants", "other")]
)
def test_wrong_input_is_one_line_and_a_non_zero_exit(wrong: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.simulation", *wrong], capture_output=True, text=True)
    assert done.returncode == 2 and wrong[0] in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_our_engine_and_opacus_do_the_work_of_the_bare_loop() -> None:
    asked = ["--check", "--steps", "10", "--batch", "10", "--variants", "inline", "one by one", "opacus"]
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "benchmarks.simulation", *asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("of the largest change") == 3
