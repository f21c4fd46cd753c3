"""Runs made by hand: settings, metrics and summaries whose accuracies are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lalora_flwr.compare.results import Result
from lalora_flwr.server.folder import RunFolder
from lalora_flwr.server.metrics import RoundMetrics, Summary
from lalora_flwr.settings import flatten, settings_from

ROUNDS = 4
BASE: dict[str, Any] = {"num-rounds": ROUNDS, "num-supernodes": 2, "train.lr": 0.3, "privacy.epsilon": 3.0, "seed": 0}
BEST_LR = {"la-lora": 0.3, "dp-lora": 0.1, "ffa-lora": 1.0, "rolora": 0.3}


def accuracy_for(values: Mapping[str, Any]) -> float:
    """Highest at the method's own learning rate, growing with ε, and a little different for each seed."""
    distance = abs(math.log10(float(values["train.lr"] or 0.3) / BEST_LR[str(values["strategy"])]))
    epsilon = min(float(values["privacy.epsilon"]), 20.0)
    return round(0.9 - 0.2 * distance - 0.3 / (1 + epsilon) + 0.01 * (int(values["seed"]) % 3), 6)


def lines_for(values: Mapping[str, Any], accuracy: float) -> tuple[RoundMetrics, ...]:
    """A curve up to the accuracy; round 2 was not evaluated."""
    rounds = int(values["num-rounds"])

    def at(i: int) -> float:
        return 0.2 + (accuracy - 0.2) * (1 - math.exp(-3 * i / rounds)) / (1 - math.exp(-3))

    return tuple(
        RoundMetrics(
            round=i,
            quality={"accuracy": None if i == 2 < rounds else at(i)},
            bytes_up=1000 if values["strategy"] == "ffa-lora" else 2000,
        )
        for i in range(1, rounds + 1)
    )


def summary_for(values: Mapping[str, Any], accuracy: float) -> Summary:
    epsilon = float(values["privacy.epsilon"])
    sent = sum(line.bytes_up for line in lines_for(values, accuracy))
    return Summary(
        strategy=values["strategy"],
        model=values["model.name"],
        data=values["data.name"],
        seed=values["seed"],
        rounds=values["num-rounds"],
        quality={"accuracy": accuracy, "loss": 1 - accuracy, "f1": accuracy / 2},
        frozen={"accuracy": 0.2},
        epsilon=epsilon,
        delta=values["privacy.delta"],
        noise_multiplier=0.0 if math.isinf(epsilon) else 1.5,
        sample_rate=0.1,
        private=math.isfinite(epsilon),
        seeded=True,
        bytes_up=sent,
        bytes_down=2 * sent,
        seconds=1.5,
        peak_memory_mb=100.0,
    )


def flat(**overrides: Any) -> dict[str, Any]:
    """Resolved settings; ``train__lr=0.1`` overrides a key."""
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in overrides.items()}
    return dict(flatten(settings_from({**BASE, **named})))


def result(accuracy: float | None = None, tuned: bool = False, stages: tuple[str, ...] = (), **overrides: Any) -> Result:
    """A run's result; ``accuracy=None`` takes the one of `accuracy_for`."""
    values = flat(**overrides)
    accuracy = accuracy_for(values) if accuracy is None else accuracy
    labels = (("strategy", str(values["strategy"])), ("privacy.epsilon", f"{values['privacy.epsilon']:g}"))
    at = (("train.lr", values["train.lr"]),) if tuned else ()
    return Result(Path("runs") / "run", labels, values, at, stages, summary_for(values, accuracy), lines_for(values, accuracy))


def failed(**overrides: Any) -> Result:
    """A run that has no summary."""
    values = flat(**overrides)
    labels = (("strategy", str(values["strategy"])), ("privacy.epsilon", f"{values['privacy.epsilon']:g}"))
    return Result(Path("runs") / "run", labels, values, stages=("final",), failure="diverged")


def write_run(parent: Path, name: str, finished: bool = True, **overrides: Any) -> Path:
    """A run folder on disk."""
    values = flat(**overrides)
    folder = RunFolder(settings_from({**values, "output-dir": str(parent), "run-name": name}))
    folder.add_metrics(*lines_for(values, accuracy_for(values)))
    if finished:
        folder.finish(summary_for(values, accuracy_for(values)))
    return folder.path
