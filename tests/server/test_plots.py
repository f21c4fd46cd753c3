"""The titles of a run's plots."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lalora_flwr.server.metrics import RoundMetrics
from lalora_flwr.server.plots import score_figure
from tests.conftest import small


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize(("epsilon", "said"), [(4.0, "ε = 4"), (math.inf, "non-private")])
def test_the_title_says_seeded_only_of_seeded_runs(seeded: bool, epsilon: float, said: str, tmp_path: Path) -> None:
    lines = [RoundMetrics(round=1, quality={"accuracy": 0.5}, epsilon=1.0)]
    figure = score_figure(small(tmp_path, privacy__epsilon=epsilon), {"accuracy": 0.2}, lines, seeded=seeded)
    title = figure.axes[0].get_title()
    assert said in title and title.endswith(", seeded") == seeded


@pytest.mark.parametrize("worst", [-7.5, -0.5])
def test_values_below_the_axis_are_said(worst: float, tmp_path: Path) -> None:
    lines = [RoundMetrics(round=n, quality={"r2": value}, epsilon=1.0) for n, value in ((1, worst), (2, 0.3))]
    axes = score_figure(small(tmp_path), {"r2": -0.1}, lines, seeded=True).axes[0]
    said = [text.get_text() for text in axes.texts]
    assert said == (["below -1 and not shown: 1 of 3 values"] if worst < -1 else [])
    assert axes.get_ylim() == (max(-1.0, worst), 1.0) and axes.get_ylabel() == "test R²"
