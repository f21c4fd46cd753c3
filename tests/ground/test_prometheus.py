"""Prometheus' text format: read back by this package and, where it is installed, by Prometheus' own client."""

from __future__ import annotations

import math
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lalora_flwr.ground.prometheus import LONGEST_LABEL, Family, exposition, labels, samples_of, write_metrics

FAMILIES = [
    Family("spent", "What was spent.", {labels(site="ward 7"): 1.5, labels(site='a "b"\\\n'): math.inf, labels(site="x"): None}),
    Family("rounds_total", "Rounds.", {(): 3}),
    Family("nothing", "Of no value.", {(): None}),
]


def test_the_text_is_what_prometheus_takes() -> None:
    assert exposition(FAMILIES).splitlines() == [
        "# HELP spent What was spent.",
        "# TYPE spent gauge",
        'spent{site="ward 7"} 1.5',
        'spent{site="a \\"b\\"\\\\\\n"} +Inf',
        "# HELP rounds_total Rounds.",
        "# TYPE rounds_total counter",
        "rounds_total 3",
    ]


NUMBERS = st.one_of(st.integers(-(10**12), 10**12), st.floats(allow_nan=False))


@given(st.dictionaries(st.text(max_size=LONGEST_LABEL), NUMBERS, max_size=5))
def test_what_is_written_is_read_back(values: dict[str, float]) -> None:
    text = exposition([Family("x_total", "X.", {labels(of=name): value for name, value in values.items()})])
    assert samples_of(text) == {("x_total", labels(of=name)): value for name, value in values.items()}


@given(st.text())
def test_any_other_text_is_no_reason_to_fail(text: str) -> None:
    samples_of(text)


def test_prometheus_own_parser_reads_the_same() -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    read = {
        (one.name, tuple(one.labels.items())): one.value
        for of in parser.text_string_to_metric_families(exposition(FAMILIES))
        for one in of.samples
    }
    assert read == samples_of(exposition(FAMILIES)) and len(read) == 3


def test_a_file_is_replaced_as_a_whole_and_others_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "site.prom"
    path.write_text("old")
    (tmp_path / "link.prom").hardlink_to(path)
    write_metrics(path, FAMILIES)
    assert (tmp_path / "link.prom").read_text() == "old"  # who has opened it reads on
    assert path.read_text() == exposition(FAMILIES) and stat.S_IMODE(path.stat().st_mode) & 0o044
    assert [one.name for one in tmp_path.glob("*") if one.suffix != ".prom"] == []


def test_labels_have_a_bounded_length() -> None:
    assert len(labels(site="x" * 10**6)[0][1]) == LONGEST_LABEL
