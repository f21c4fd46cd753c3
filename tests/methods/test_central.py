"""Centralised DP-LoRA: one site, which holds all records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lalora_flwr.ground.errors import ConfigError
from tests.conftest import Finished, small


def test_it_is_dp_lora_with_one_site_that_holds_all_records(finished: Callable[..., Finished]) -> None:
    one = {"num_supernodes": 1, "train__local_steps": 1, "num_rounds": 1, "privacy__accountant": "rdp"}
    central, plain, three = finished(strategy="central-dp-lora", **one), finished(strategy="dp-lora", **one), finished()
    assert central.checkpoint.keys() == plain.checkpoint.keys()
    assert all(torch.equal(central.checkpoint[name], value) for name, value in plain.checkpoint.items())
    q, of_three = (run.summary["sample_rate"] for run in (central, three))
    assert q == pytest.approx(of_three / 3, rel=0.02)  # of as many records as three sites have
    assert central.summary["sites"].keys() == {"0"} and central.summary["centralised"] is True
    assert "centralised" not in three.summary
    assert "trained on one site that held all records" in (central.path / "adapter" / "README.md").read_text()
    assert "trained across 3 sites" in (three.path / "adapter" / "README.md").read_text()


def test_more_sites_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num-supernodes = 3: must be 1 for strategy = 'central-dp-lora'"):
        small(tmp_path, strategy="central-dp-lora")
