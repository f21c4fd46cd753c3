"""A run's lines and summary: what is written is what is read, of this version and of older ones."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lalora_flwr.server.folder import to_json
from lalora_flwr.server.metrics import RoundMetrics, SiteReport, Summary
from lalora_flwr.server.round_signals import Signals
from tests.conftest import Finished

counts, sizes, words = st.integers(0, 2**40), st.floats(0, 1e9), st.text(max_size=9)
known = st.none() | sizes
SIGNALS = [field.name for field in dataclasses.fields(Signals)]
QUALITY = st.dictionaries(st.sampled_from(["accuracy", "loss", "f1", "site_accuracy", "another"]), known)
LINES = st.builds(
    RoundMetrics,
    round=counts,
    quality=QUALITY,
    epsilon=sizes | st.just(math.inf),
    sites=counts,
    failed_sites=st.dictionaries(words, words),
    left_sites=st.lists(words).map(tuple),
    seconds=sizes,
    private=st.booleans(),
    peak_memory_mb=known,
    **{name: st.none() | st.floats(-9, 1e9) for name in SIGNALS},
)
REPORTS = st.builds(
    SiteReport, steps=counts, epsilon=sizes, noise_multiplier=known, evaluation_noise=st.none() | st.floats(0.3, 9)
)
SUMMARIES = st.builds(
    Summary,
    strategy=words,
    model_files=st.dictionaries(words, words),
    ended_early=words,
    quality=QUALITY,
    frozen=QUALITY,
    epsilon=sizes | st.just(math.inf),
    leaks=words,
    sites=st.dictionaries(words, REPORTS),
)


@given(LINES | SUMMARIES)
def test_what_is_written_is_read(record: RoundMetrics | Summary) -> None:
    assert type(record).from_json(json.loads(to_json(record.to_json()))) == record


def test_the_files_of_a_run_are_read_and_written_to_the_byte(finished: Callable[..., Finished]) -> None:
    path = finished().path
    for line in (path / "metrics.jsonl").read_text().splitlines():
        assert to_json(RoundMetrics.from_json(json.loads(line)).to_json()) == line
    text = (path / "summary.json").read_text()
    assert to_json(Summary.from_json(json.loads(text)).to_json(), indent=2) + "\n" == text


def test_files_of_the_first_version_are_read() -> None:
    line = RoundMetrics.from_json({"round": 2, "accuracy": 0.5, "loss": 1.0, "epsilon": None, "bytes_up": 7, "train_loss": 3.0})
    assert (line.round, line.score, line.epsilon, line.bytes_up, line.left_sites) == (2, 0.5, math.inf, 7, ())
    content = {
        "strategy": "la-lora",
        "task": "image",
        "accuracy": 0.5,
        "epsilon": 3.0,
        "sites": {"0": {"steps": 4, "epsilon": 3.0}},
    }
    summary = Summary.from_json(content)
    assert summary.quality == {"accuracy": 0.5} and summary.sites["0"].steps == 4 and summary.frozen_score is None


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (RoundMetrics, {"accuracy": 0.5}),
        (RoundMetrics, {"round": "1"}),
        (RoundMetrics, {"round": True}),
        (RoundMetrics, [1]),
        (Summary, {"epsilon": "3"}),
        (Summary, {"sites": [1]}),
        (Summary, {"sites": {"0": {"steps": 1.5}}}),
        (Summary, "finished"),
    ],
)
def test_what_is_no_record_is_refused(kind: Any, content: object) -> None:
    with pytest.raises(ValueError):
        kind.from_json(content)
