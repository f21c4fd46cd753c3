"""Finished runs as rows: read from their folders, written as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from lalora_flwr.compare.cells import Labels, Tuned, method_label
from lalora_flwr.compare.grid import EPSILON, LR, RESERVED, SEED, label_of
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.server.metrics import CONFIG, HEADLINES, METRICS, SUMMARY, RoundMetrics, Summary
from lalora_flwr.settings import Kind, Value, keys_of, read_toml

PERFORMANCE = keys_of(Kind.PERFORMANCE)
AFTER_METRICS = ("epsilon", "noise_multiplier", "sample_rate", "bytes_up", "bytes_down", "seconds")


@dataclass(frozen=True)
class Result:
    """One run of a comparison. A failed one has a reason and no summary.

    Attributes:
        labels: the compared axes but the seed.
        tuned: the tuned keys' values in this run.
        stages: what the run was used for: tuning, final, or both; empty for a run that stands alone.
        values: its resolved settings, flat.
    """

    path: Path
    labels: Labels
    values: Mapping[str, Value]
    tuned: Tuned = ()
    stages: tuple[str, ...] = ()
    summary: Summary | None = None
    metrics: tuple[RoundMetrics, ...] = ()
    failure: str = ""

    @property
    def method(self) -> str:
        return method_label(self.labels, str(self.values["strategy"]))

    @property
    def stem(self) -> str:
        """The method apart from its learning rate."""
        return method_label(self.labels, str(self.values["strategy"]), without=[LR])

    @property
    def epsilon(self) -> float:
        return float(self.values[EPSILON])

    @property
    def lr(self) -> float:
        return float(self.values[LR])

    @property
    def score(self) -> float | None:
        """The headline metric of the last round; None if the run failed or diverged."""
        value = self.summary.score if self.summary else None
        return value if value is not None and math.isfinite(value) else None

    @property
    def frozen_score(self) -> float | None:
        """The same before training."""
        return self.summary.frozen_score if self.summary and not self.summary.started_from else None

    @property
    def seeded(self) -> bool:
        """Whether all its draws follow from its seed."""
        return self.summary is not None and self.summary.seeded

    @property
    def is_final(self) -> bool:
        return not self.stages or "final" in self.stages

    @property
    def is_tuning(self) -> bool:
        return "tuning" in self.stages


def is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def is_finished(folder: Path) -> bool:
    """Whether the run wrote its last file. One that did not is never used in part."""
    return (folder / SUMMARY).is_file()


def read_run(folder: Path) -> tuple[dict[str, Value], Summary, tuple[RoundMetrics, ...]]:
    """Settings, summary and lines of metrics of a finished run.

    Raises:
        ConfigError: if a file is missing or cannot be read.
    """
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
        return (
            cast(dict[str, Value], read_toml(folder / CONFIG)),
            _summary(folder),
            tuple(RoundMetrics.from_json(json.loads(line)) for line in lines),
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: not a finished run: {error}") from None


def saved_score(folder: Path) -> float | None:
    """The headline metric of a finished run's last round."""
    return _summary(folder).score


def metric_name(results: Iterable[Result]) -> str:
    """The headline metric of these runs, as people call it; several if the tasks differ."""
    names = dict.fromkeys(HEADLINES[result.summary.metric] for result in results if result.summary)
    return " or ".join(names) or HEADLINES["accuracy"]


def _summary(folder: Path) -> Summary:
    return Summary.from_json(json.loads((folder / SUMMARY).read_text(encoding="utf-8")))


def varying(results: Sequence[Result]) -> list[str]:
    """Run-config keys that are not the same in all runs, apart from where results go."""
    keys = dict.fromkeys(key for result in results for key in result.values if key not in RESERVED)
    return [key for key in keys if len({repr(result.values.get(key)) for result in results}) > 1]


def task_metrics(results: Sequence[Result]) -> list[str]:
    """What the tasks measure besides: F1, exact match, ..."""
    names = dict.fromkeys(name for result in results if result.summary for name in result.summary.quality)
    return [name for name in names if name not in (*_headlines(results), "loss")]


def _headlines(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.summary.metric for result in results if result.summary)) or ["accuracy"]


def csv_text(results: Sequence[Result], out: Path) -> str:
    """One line a run; paths are relative to ``out``."""
    fixed = ["strategy", EPSILON, SEED, LR]
    keys = fixed + [key for key in varying(results) if key not in fixed]
    names = _headlines(results)
    metrics = [*names, "loss", *task_metrics(results), *(f"frozen_{name}" for name in names), *AFTER_METRICS]
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["method", "stage", *keys, *metrics, "run", "failure"])
    for result in results:
        numbers = result.summary.numbers() if result.summary else {}
        rows.writerow(
            [
                result.method,
                "+".join(result.stages),
                *(_field(result.values.get(key)) for key in keys),
                *(_field(numbers.get(name)) for name in metrics),
                os.path.relpath(result.path, out),
                " ".join(result.failure.split()),
            ]
        )
    return file.getvalue()


def _field(value: Value | None) -> str:
    """Floats in full, so that a reader gets back the same number."""
    return "" if value in (None, "") else repr(value) if isinstance(value, float) else label_of(value)


def by_epsilon(results: Iterable[Result]) -> dict[float, list[Result]]:
    """The runs by ε, ascending; non-private last."""
    found: dict[float, list[Result]] = {}
    for result in results:
        found.setdefault(result.epsilon, []).append(result)
    return dict(sorted(found.items()))


def by_method(results: Iterable[Result]) -> Iterator[tuple[str, list[Result]]]:
    """The runs by method, in the order in which the methods first appear."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.method, []).append(result)
    yield from found.items()
