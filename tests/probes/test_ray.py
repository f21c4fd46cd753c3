"""The same extensions under Ray, where the server and the sites are processes that find them by their entry points alone.

A run starts in this process, is killed after its first round and goes on under Ray, to the last bit of one that never stopped.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lalora_flwr.engines.ray_process import CLIENT_APP
from lalora_flwr.engines.simulation import run_simulation
from tests.probes.runs import PROBES, adapter_of, killed_after, run, settings_of

pytestmark = pytest.mark.usefixtures("probes")


SAMPLED = ("mask per layer", "BitFit", "canary")  # what CI has time for; make test-nightly takes all


@pytest.mark.slow
@pytest.mark.parametrize("probe", [p if p in SAMPLED else pytest.param(p, marks=pytest.mark.nightly) for p in PROBES])
def test_it_goes_on_under_ray(probe: str, tmp_path: Path) -> None:
    straight = adapter_of(run(probe, tmp_path / "straight").path)
    killed_after(probe, tmp_path, 1)
    app = "lalora_probes.canary:app" if probe == "canary" else CLIENT_APP
    resumed = adapter_of(run_simulation(settings_of(probe, tmp_path, resume=True), client_app=app))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
