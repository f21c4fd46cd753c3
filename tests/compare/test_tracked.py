"""The runs of a comparison may be followed; who does so is no difference between them."""

from __future__ import annotations

from pathlib import Path

from lalora_flwr.compare.cells import make_cell


def test_a_tracker_follows_the_runs_of_a_comparison_and_renames_none(tmp_path: Path) -> None:
    plain = make_cell({"strategy": "ffa-lora"}, tmp_path)
    tracked = make_cell({"strategy": "ffa-lora", "track": "tensorboard", "metrics-file": "x.prom"}, tmp_path)
    assert tracked.name == plain.name
    assert (tracked.settings.track, tracked.settings.metrics_file) == ("tensorboard", "")  # one file for all runs says nothing
