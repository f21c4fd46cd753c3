"""Sites in one pass: the same bits as one after the other, whatever the method."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.machine import processor
from lalora_flwr.engines.inline import InlineGrid, simulated_app
from lalora_flwr.engines.together import SitesTogether
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.gradients.records import Owners
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.server.place import folder_for
from lalora_flwr.server.run import run_federation
from lalora_flwr.settings import Settings, flatten
from lalora_flwr.settings.stages import stage_of
from lalora_flwr.site.host import Host
from lalora_flwr.training.company import company
from lalora_flwr.training.learner import Learner, LearnerCache, ModelStore, Wanted
from lalora_flwr.training.together import ALONE, Company
from tests.conftest import MODELS, Finished, small
from tests.training.sharing import ticking

KINDS: dict[str, dict[str, Any]] = {
    "la-lora": {},
    "dp-lora, trained head": {"strategy": "dp-lora", "lora.head": "trained"},
    "bitfit": {"strategy": "bitfit", "lora.rank": 4, "lora.alpha": 8.0, "lora.targets": "auto"},
    "fed-sb": {"strategy": "fed-sb"},
    "fedex-lora": {"strategy": "fedex-lora"},
    "hetlora": {"strategy": "hetlora", "profiles": "rank=1;rank=2;rank=1"},
    "flora": {"strategy": "flora", "profiles": "rank=1;rank=2;rank=1"},
    "as-lora": {"strategy": "as-lora"},
    "visual-prompt": {"strategy": "visual-prompt", "lora.rank": 4, "lora.alpha": 8.0, "lora.targets": "auto"},
    "memory and momentum": {"filter.name": "doppler", "train.momentum": 0.5},
    "kalman": {"strategy": "dp-lora", "filter.name": "kalman"},
    "augmentations": {"train.augmentations": 2, "train.batch-size": 16},
    "parts": {"train.max-physical-batch": 16},
    "secure sum": {"strategy": "steady-lora", "trust": "secure-sum", "train.local-steps": 1},
    "not private": {"privacy.epsilon": float("inf")},
}
TOGETHER = Company(3, 1)  # whatever the bits


class Watching(ModelStore):
    """Counts the passes that several sites share."""

    shared = 0

    def make(self, wanted: Wanted) -> Learner:
        learner = MODELS.make(wanted)
        return replace(learner, engine=WatchedEngine(learner.engine, self))


class WatchedEngine(PerSampleGradients):
    def __init__(self, engine: PerSampleGradients, store: Watching) -> None:
        self._engine, self._store = engine, store
        self.owned = engine.owned

    def __call__(self, records: int, losses: Callable[[], Tensor], owners: Owners | None = None) -> dict[str, Tensor]:
        self._store.shared += owners is not None
        return self._engine(records, losses, owners)


def hosted(store: ModelStore) -> Host:
    return Host(simulated=True, learners=LearnerCache(store))


def run_together(settings: Settings, store: ModelStore, found: Company = TOGETHER, worth_it: int = 0) -> dict[str, Tensor]:
    together = SitesTogether(hosted(store), find=lambda learner, records, rounding: found, worth_it=worth_it)
    grid = InlineGrid(simulated_app(MODELS), settings.num_supernodes, dict(flatten(settings)), together)
    return load_file(run_federation(settings, grid, models=MODELS) / "checkpoint" / "adapter.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_is_that_of_one_site_after_the_other(kind: str, tmp_path: Path, finished: Callable[..., Finished]) -> None:
    """To the bit, if this processor's products allow it, as `company` finds out; else up to rounding."""
    store = Watching()
    alone = finished(**{key.replace(".", "__").replace("-", "_"): value for key, value in KINDS[kind].items()})
    found = company(MODELS.learner(stage_of(alone.settings, 1)), alone.settings.train.batch_size, clock=ticking(1e-3))
    exact = found != ALONE and "avx512_bf16" in processor()  # on which every size of a batch was compared
    own = replace(alone.settings, output_dir=str(tmp_path))
    together = run_together(own, store, replace(found, sites=3) if exact else TOGETHER)
    assert store.shared and together.keys() == alone.checkpoint.keys()
    assert not exact or same(together, alone.checkpoint)
    for name, value in together.items():
        assert torch.allclose(value, alone.checkpoint[name], rtol=1e-3, atol=1e-4), name


def test_a_site_without_company_is_alone(tmp_path: Path, finished: Callable[..., Finished]) -> None:
    store, alone = Watching(), finished()
    assert same(run_together(replace(alone.settings, output_dir=str(tmp_path)), store, Company(1, 1)), alone.checkpoint)
    assert not store.shared


def test_within_rounding(tmp_path: Path, finished: Callable[..., Finished]) -> None:
    """The run says so, and does not go on as another one."""
    store, single = Watching(), finished()
    settings = small(tmp_path, train__share_passes="rounding")
    asked: list[bool] = []

    def find(learner: Learner, records: float, rounding: bool) -> Company:
        asked.append(rounding)
        return replace(TOGETHER, rounding=rounding, by_record=rounding)

    together = SitesTogether(hosted(store), find, worth_it=0)
    path = run_federation(settings, InlineGrid(simulated_app(MODELS), 3, dict(flatten(settings)), together), models=MODELS)
    assert store.shared and asked == [True]
    found = load_file(path / "checkpoint" / "adapter.safetensors")
    assert all(torch.allclose(value, single.checkpoint[name], rtol=1e-3, atol=1e-4) for name, value in found.items())
    assert json.loads((path / "summary.json").read_text())["share_passes"] == "rounding"
    assert "share_passes" not in single.summary
    (path / "summary.json").unlink()
    with pytest.raises(ConfigError, match=r"train\.share-passes = 'exact': the run to resume has 'rounding'"):
        folder_for(replace(small(tmp_path), resume=True))


@pytest.mark.parametrize("why", ["short", "dropout", "off"])
def test_not_worth_it(why: str, tmp_path: Path) -> None:
    store = Watching()
    other = {"dropout": {"lora__dropout": 0.1}, "off": {"train__share_passes": "off"}}
    settings = small(tmp_path, **other.get(why, {}))
    run_together(settings, store, worth_it=100 if why == "short" else 0)
    assert not store.shared
