"""Runs of the probes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from lalora_flwr.engines.inline import run_inline, simulated_app
from lalora_flwr.server.metrics import RoundMetrics
from lalora_flwr.settings import Settings
from tests.conftest import MODELS, Finished, Spy, small

PROBES: dict[str, dict[str, Any]] = {  # what a user names to get it
    "server-side SVD": {"strategy": "probe-svd"},
    "mask per layer": {"strategy": "probe-mask"},
    "rank per site": {"strategy": "probe-ranks"},
    "BitFit": {"strategy": "probe-bitfit"},
    "masked sum": {"strategy": "probe-masked-sum"},
    "canary": {"strategy": "la-lora"},
    "filter over time": {"strategy": "la-lora", "filter__name": "probe-momentum"},
}


class Killed(BaseException):
    """Ends a run where it is, past every handler."""


def settings_of(probe: str, folder: Path, **more: Any) -> Settings:
    return small(folder, **{"num_rounds": 3, "lora__rank": 3, **PROBES[probe], **more})


def sites_of(probe: str) -> Callable[..., Any]:
    """The ClientApp of the probe's sites."""
    if probe == "canary":
        from lalora_probes.canary import app

        return app
    return simulated_app(MODELS)


def run(probe: str, folder: Path, **more: Any) -> Finished:
    """A whole run in this process."""
    settings, app = settings_of(probe, folder, **more), sites_of(probe)
    spy: Any = Spy(lambda message, context, _: app(message, context))
    return Finished(run_inline(settings, app=spy, models=MODELS), settings, spy)


def killed_after(probe: str, folder: Path, rounds: int) -> None:
    def on_round(line: RoundMetrics) -> None:
        if line.round == rounds:
            raise Killed

    app: Any = sites_of(probe)
    with pytest.raises(Killed):
        run_inline(settings_of(probe, folder), on_round, app, MODELS)


def adapter_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a run's adapter folder, whoever wrote it."""
    (path,) = (folder / "adapter").glob("*.safetensors")
    return dict(load_file(path))
