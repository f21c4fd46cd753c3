"""Sites that lie about steps, noise and ε are rejected or not believed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict

from lalora_flwr.ground.errors import RunFailed
from lalora_flwr.privacy.accounting import noise_multiplier_for
from lalora_flwr.wire.orders import ARRAYS
from tests.conftest import Finished, arrays_of, run_spied, small
from tests.server.lies import LIAR, ROUNDS, STEPS, Lie, counters_of, lying, not_a_number, scaled


def says(**counters: float) -> Lie:
    """The reply with other counters."""

    def lie(content: RecordDict) -> None:
        counters_of(content).update({name.replace("_", "-"): value for name, value in counters.items()})

    return lie


def times(name: str, factor: float) -> Lie:
    def lie(content: RecordDict) -> None:
        counters_of(content)[name] *= factor

    return lie


def renamed(content: RecordDict) -> None:
    arrays: Any = content[ARRAYS]
    name = sorted(arrays)[0]
    arrays[name + ".x"] = arrays.pop(name)


def with_bytes(content: RecordDict) -> None:
    arrays: Any = content[ARRAYS]
    arrays[sorted(arrays)[0]].data += bytes(10**6)


LIES: dict[str, tuple[Lie, str]] = {
    "epsilon = inf": (says(epsilon=math.inf), "epsilon is inf, above the run's 4"),
    "epsilon above the target": (says(epsilon=4.01), "above the run's 4"),
    "sigma too small": (times("noise-multiplier", 0.9), "noise multiplier"),
    "sigma too large": (times("noise-multiplier", 1.1), "noise multiplier"),
    "no noise": (says(noise_multiplier=0.0), "noise multiplier"),
    "no noise, and saying so": (says(noise_multiplier=0.0, epsilon=math.inf), "noise multiplier"),
    "the steps of the round before": (says(steps=STEPS), "counts 2 steps, not between the 4 it was asked for"),
    "no step": (says(steps=0), "counts 0 steps"),
    "too many steps": (says(steps=ROUNDS * STEPS + 1), "counts 5 steps"),
    "half a step": (says(steps=2.5), "no whole number"),
    "q above 1": (says(sample_rate=1.5), "sample rate"),
    "q = 0": (says(sample_rate=0.0), "sample rate"),
    "a tiny q": (says(sample_rate=1e-300), "sample rate"),
    "q of no number of records": (times("sample-rate", 1.0001), "sample rate"),
    "q of other records": (says(sample_rate=40 / 500), "sample rate changed"),
    "not seeded": (says(seeded=0), "not seeded"),
    "half seeded": (says(seeded=0.5), "seeded or not"),
    "a NaN": (not_a_number, "not finite"),
    "another name": (renamed, "not those asked for"),
    "a megabyte more": (with_bytes, "more bytes"),
    "tensors of millions": (scaled(1e8), "above"),
}


@pytest.mark.parametrize("what", LIES)
def test_a_lie_is_rejected_and_leaves_the_runs_epsilon_alone(
    what: str, tmp_path: Path, finished: Callable[..., Finished]
) -> None:
    """The liar told the truth in round 1, so the server knows its σ and q, and counts round 2 at those."""
    lie, said = LIES[what]
    spy, settings = lying(lie, 2), small(tmp_path)
    run, honest = Finished(run_spied(settings, spy), settings, spy), finished()
    first, second = run.metrics
    assert first["failures"] == 0 and first["epsilon"] == honest.metrics[0]["epsilon"]
    assert second["failed_sites"].keys() == {str(LIAR)} and said in second["failed_sites"][str(LIAR)]
    assert second["epsilon"] == run.summary["epsilon"] == honest.summary["epsilon"]
    assert {s: c["steps"] for s, c in run.summary["sites"].items()} == {"0": 4, "1": 4, "2": 4}
    good = [arrays_of(reply) for i, (_, reply) in enumerate(spy.training(2)) if i != LIAR]
    for name, value in run.checkpoint.items():
        np.testing.assert_allclose(value, (good[0][name].double() + good[1][name].double()) / 2, atol=1e-7)


@pytest.mark.parametrize("what", ["epsilon = inf", "no noise, and saying so", "q above 1", "too many steps"])
def test_a_site_that_never_tells_the_truth_counts_with_the_runs_target(what: str, tmp_path: Path) -> None:
    settings, spy = small(tmp_path), lying(LIES[what][0], 1, 2)
    run = Finished(run_spied(settings, spy), settings, spy)
    assert [line["failures"] for line in run.metrics] == [1, 1]
    assert [line["epsilon"] for line in run.metrics] == [4.0, 4.0] and run.summary["epsilon"] == 4.0
    liar = run.summary["sites"][str(LIAR)]
    assert (liar["steps"], liar["noise_multiplier"], liar["claimed_epsilon"]) == (4, None, None)


def test_a_liar_too_many_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"1 of 3 sites failed, max-failures = 0 \(site 1: reply rejected: its epsilon is inf"):
        run_spied(small(tmp_path, max_failures=0), lying(LIES["epsilon = inf"][0], 1))


def test_more_steps_than_asked_are_shown_and_not_counted(tmp_path: Path, finished: Callable[..., Finished]) -> None:
    """A site may count more by its own ledger, up to what its noise is calibrated for."""
    settings, spy = small(tmp_path), lying(says(steps=4, epsilon=3.99), 1)
    run = Finished(run_spied(settings, spy), settings, spy)
    assert [line["epsilon"] for line in run.metrics] == [line["epsilon"] for line in finished().metrics]
    assert run.summary["sites"][str(LIAR)]["claimed_steps"] == 4


def test_a_smaller_epsilon_than_the_servers_is_shown_and_not_believed(tmp_path: Path, finished: Callable[..., Finished]) -> None:
    settings, spy = small(tmp_path), lying(says(epsilon=0.0), 1, 2)
    run = Finished(run_spied(settings, spy), settings, spy)
    assert run.metrics[-1]["failures"] == 0 and run.summary["epsilon"] == finished().summary["epsilon"]
    liar = run.summary["sites"][str(LIAR)]
    assert liar["claimed_epsilon"] == 0.0 and liar["epsilon"] == pytest.approx(run.summary["epsilon"], rel=0.01)


def test_a_changed_sample_rate_is_rejected_even_with_the_right_noise(tmp_path: Path) -> None:
    q = 40 / 500
    sigma = noise_multiplier_for(4.0, 1e-4, q, ROUNDS * STEPS)
    settings, spy = small(tmp_path), lying(says(sample_rate=q, noise_multiplier=sigma), 2)
    run = Finished(run_spied(settings, spy), settings, spy)
    assert "its sample rate changed" in run.metrics[-1]["failed_sites"][str(LIAR)]


def test_a_real_site_with_seeded_noise_is_rejected(tmp_path: Path) -> None:
    settings, spy = small(tmp_path), lying(says(seeded=1), 2, reals=True)
    run = Finished(run_spied(settings, spy), settings, spy)
    assert [list(line["failed_sites"].values()) for line in run.metrics] == [[], ["reply rejected: its noise is seeded"]]
    assert run.summary["seeded"] is False and not any(site["seeded"] for site in run.summary["sites"].values())


def test_in_a_run_without_privacy_noise_is_a_lie(tmp_path: Path) -> None:
    settings, spy = small(tmp_path, privacy__epsilon=math.inf), lying(says(noise_multiplier=1.0, epsilon=1.0), 2)
    run = Finished(run_spied(settings, spy), settings, spy)
    assert "noise multiplier is 1, the run's target asks for 0" in run.metrics[-1]["failed_sites"][str(LIAR)]
    assert run.summary["epsilon"] is None and run.summary["private"] is False
