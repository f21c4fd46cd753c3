"""The diagnosis of one finished run, and ``diagnosis.json``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from lalora_flwr.adapter.slots import LORA_A
from lalora_flwr.diagnose.curvature import Eigenvalue, MeanLoss, largest_eigenvalue, merged_weights
from lalora_flwr.diagnose.landscape import Landscape, landscape
from lalora_flwr.diagnose.noise import Amplification, amplification
from lalora_flwr.diagnose.opened import Opened, differs
from lalora_flwr.diagnose.updates import Cost, Released, cost, released, without_signals
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.server.metrics import RoundMetrics
from lalora_flwr.training.evaluate import evaluate
from lalora_flwr.training.learner import Learner

FILE = "diagnosis.json"
POINTS, RECORDS = 11, 256


@dataclass(frozen=True)
class Effort:
    """How much is computed.

    Attributes:
        records: public records at most that curvature and landscape are computed on.
        points: of a side of the landscape's plane, odd; 0: no landscape.
    """

    records: int = RECORDS
    points: int = POINTS

    def __post_init__(self) -> None:
        if self.records < 1:
            raise ConfigError(f"--records {self.records}: at least 1")
        if self.points and (self.points < 3 or not self.points % 2):
            raise ConfigError(f"--points {self.points}: an odd number from 3, or 0 for no landscape")


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was found of a run. All of it follows from released tensors, public constants and public records.

    Attributes:
        run: its folder.
        strategy, epsilon, seed, num_rounds: of the run.
        values: its settings, by which runs are told apart.
        metric, score, loss: on all of its public records, of the model made here.
        released, cost: of its rounds.
        amplification: what its noise does to the products.
        records: public records that curvature and landscape are computed on.
        merged: largest eigenvalue of the Hessian with respect to the merged weights of the adapted layers, all of them together;
            None if the form adapts no weights.
        adapter: the same with respect to the adapter's tensors.
        landscape: in the merged weights, or where there are none in the adapter's tensors.
        notes: what is not known and why.
    """

    run: str
    strategy: str
    epsilon: float
    seed: int
    num_rounds: int
    values: dict[str, object]
    metric: str
    score: float | None
    loss: float | None
    rounds: tuple[RoundMetrics, ...]
    released: Released
    cost: Cost
    amplification: Amplification
    records: int
    merged: Eigenvalue | None
    adapter: Eigenvalue
    landscape: Landscape | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """Without the rounds, which the run's own file has."""
        content = dataclasses.asdict(dataclasses.replace(self, rounds=()))
        del content["rounds"]
        return content


def diagnose(run: Opened, effort: Effort) -> Diagnosis:
    """Diagnose a finished run.

    Guarantee: reads what the run wrote at the server, which is released or public, and its public records. No site is asked.

    Raises:
        ConfigError: the run's model or public records cannot be loaded.
    """
    learner, records = run.model()
    quality = evaluate(learner, records)
    loss = MeanLoss(learner, records, effort.records)
    weights, own = merged_weights(learner.adapter), list(learner.adapter.parameters.values())
    merged = _curvature(loss, weights) if weights else None
    adapter = _curvature(loss, own)
    noise = amplification(run.settings, run.method, learner.adapter.layout, run.summary, run.adapter)
    return Diagnosis(
        run=str(run.path),
        strategy=run.settings.strategy,
        epsilon=run.settings.privacy.epsilon,
        seed=run.settings.seed,
        num_rounds=run.settings.num_rounds,
        values=dict(run.values),
        metric=run.summary.metric,
        score=quality.get(run.summary.metric),
        loss=quality.get("loss"),
        rounds=run.rounds,
        released=released(run.rounds),
        cost=cost(run.rounds, run.summary.peak_memory_mb),
        amplification=noise,
        records=loss.records,
        merged=merged,
        adapter=adapter,
        landscape=landscape(loss, weights or own, effort.points) if effort.points else None,
        notes=tuple(note for note in _notes(run, learner, noise, merged, adapter, differs(run.summary, quality)) if note),
    )


def _curvature(loss: MeanLoss, parameters: list[nn.Parameter]) -> Eigenvalue:
    size = sum(parameter.numel() for parameter in parameters)
    return largest_eigenvalue(loss.hessian(parameters), torch.zeros(size, device=parameters[0].device))


def _notes(
    run: Opened, learner: Learner, noise: Amplification, merged: Eigenvalue | None, adapter: Eigenvalue, differs: str
) -> list[str]:
    factors = LORA_A in learner.adapter.layout.parts
    said = [differs, f"noise amplification: {noise.unknown}" if noise.unknown else ""]
    if run.method.transport.hides_updates:
        said.append(f"single updates: hidden by {run.method.transport.name}, so no cosines and no aggregation bias")
    elif without_signals(run.rounds):
        said.append("updates: metrics.jsonl says nothing of them, as one of an older version; run it again for that")
    elif factors and run.method.server_steps:
        said.append("aggregation bias: sites send gradients, so there is none")
    for name, found in (("merged weights", merged), ("adapter", adapter)):
        if found and not found.converged:
            said.append(f"eigenvalue of the {name}: has not settled, ± {found.residual:.2g}")
    if not merged:
        said.append("merged weights: the form adapts none; the landscape is in the adapter's tensors")
    return said
