"""A finished run's folder, and the run's own model again on its public records."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lalora_flwr.compare.grid import EPSILON, LR, SEED
from lalora_flwr.compare.results import is_finished, is_run, read_run
from lalora_flwr.data.data_set import data_set
from lalora_flwr.data.records import RecordSet
from lalora_flwr.ground.errors import ConfigError, RunFailed
from lalora_flwr.ground.processors import processors
from lalora_flwr.methods.averages import RunningAverage
from lalora_flwr.methods.method import Method, method_of
from lalora_flwr.models.four_bits import NF4, unpacked
from lalora_flwr.server.folder import Checkpoint, read_checkpoint
from lalora_flwr.server.metrics import RoundMetrics, Summary
from lalora_flwr.server.place import how_it_ended
from lalora_flwr.server.strategy import AVERAGE
from lalora_flwr.settings import Settings, Value, settings_from
from lalora_flwr.training.learner import Learner, ModelStore

FULL = "float32"  # second derivatives need it, whatever the run computed in


@dataclass(frozen=True)
class Opened:
    """What a run left, read and checked.

    Attributes:
        path: its folder.
        values: its settings as its config.toml has them, flat.
        settings, method: of the run.
        summary: of the run.
        rounds: its lines of metrics.
        adapter: the tensors of the adapter that it saved: of the last round, or the average of the rounds.
    """

    path: Path
    values: dict[str, Value]
    settings: Settings
    method: Method
    summary: Summary
    rounds: tuple[RoundMetrics, ...]
    adapter: dict[str, Tensor]

    def model(self) -> tuple[Learner, RecordSet]:
        """The run's model with its adapter, in float32, and the public records that the run was evaluated on.

        Its weights are the published ones, or those that four bits make of them.

        Raises:
            ConfigError: the model or the records cannot be loaded, or are not those of the run.
        """
        model = self.settings.model
        if model.dtype != NF4:
            model = dataclasses.replace(model, dtype=FULL)
        settings = dataclasses.replace(self.settings, model=model)
        torch.set_num_threads(min(settings.train.num_threads, processors()))
        learner = ModelStore().learner(settings)
        shapes = {name: slot.shape for name, slot in learner.adapter.layout.items()}
        if shapes != {name: tuple(value.shape) for name, value in self.adapter.items()}:
            raise ConfigError(f"{self.path}: its checkpoint is not of the adapter that its config.toml makes")
        unpacked(learner.adapter.model.float())
        learner.adapter.load(self.adapter)
        return learner, data_set(settings).public(learner.base.encode)


def opened(path: Path) -> Opened:
    """Read a run's folder.

    Raises:
        ConfigError: it is no run's, or a file in it is damaged.
        RunFailed: the run is not finished.
    """
    if not is_run(path):
        raise ConfigError(f"{path}: no run's folder, as it has no config.toml")
    if not is_finished(path):
        raise RunFailed(f"{path}: holds a run {how_it_ended(path)}; there is a diagnosis of finished runs only")
    values, summary, rounds = read_run(path)
    if lacking := sorted({"strategy", EPSILON, SEED, LR} - values.keys()):
        raise ConfigError(f"{path}: its config.toml lacks {lacking[0]}, which a run writes")
    settings = settings_from({**values, "resume": False})
    if not rounds:
        raise ConfigError(f"{path}: its metrics.jsonl is empty")
    try:
        checkpoint = read_checkpoint(path)
    except RunFailed as damaged:
        raise ConfigError(str(damaged).partition(";")[0]) from None
    if checkpoint is None:
        raise ConfigError(f"{path}: its checkpoint is missing")
    method = method_of(settings)
    return Opened(path, values, settings, method, summary, rounds, _saved(checkpoint, method, settings))


def _saved(checkpoint: Checkpoint, method: Method, settings: Settings) -> dict[str, Tensor]:
    """The adapter that the run saved."""
    mark = f"{AVERAGE}/"
    sums = {n.removeprefix(mark): v.double().numpy() for n, v in checkpoint.tensors.items() if n.startswith(mark)}
    weight = checkpoint.state.get("strategy", {}).get("average", 0.0)
    if not (method.average and sums and weight):
        return checkpoint.adapter
    average = RunningAverage(settings.num_rounds)
    average.restore(weight, sums)
    return {name: torch.from_numpy(value) for name, value in average.value().items()}


def differs(summary: Summary, quality: dict[str, float]) -> str:
    """What is to be said if the model made here is not as good as the run's was; empty if it is."""
    now, then = quality.get(summary.metric), summary.score
    if now is None or then is None or not math.isfinite(then) or abs(now - then) <= 0.02:
        return ""
    return f"the model made here has {summary.metric} {now:.3f}, the run's had {then:.3f}: its weights or public records differ"
