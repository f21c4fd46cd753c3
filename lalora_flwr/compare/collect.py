"""Finished runs from folders that a user names, labelled by how they differ."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lalora_flwr.compare.folder import RECORD, RUNS
from lalora_flwr.compare.grid import EPSILON, LR, SEED, label_of
from lalora_flwr.compare.results import PERFORMANCE, Result, is_finished, is_run, read_run, varying
from lalora_flwr.compare.table import Tuning
from lalora_flwr.ground.errors import ConfigError, RunFailed


@dataclass
class Collected:
    """What was found: results, how they were tuned if one comparison holds them all, and who was left out and why."""

    results: list[Result] = field(default_factory=list)
    tuning: Tuning | None = None
    left_out: list[str] = field(default_factory=list)


def collect(folders: Iterable[Path]) -> Collected:
    """All finished runs in or below the folders.

    Raises:
        ConfigError: if a folder holds no run, or a damaged one.
        RunFailed: if no run is finished.
    """
    found = list(dict.fromkeys(path for folder in folders for path in _runs_in(folder)))
    done = [path for path in found if is_finished(path)]
    left_out = [f"{path}: not finished" for path in found if path not in done]
    if not done:
        raise RunFailed(f"no run is finished ({', '.join(str(path) for path in found)})")
    records = {path.parent.parent for path in found if path.parent.name == RUNS and (path.parent.parent / RECORD).is_file()}
    if len(records) == 1 and all(path.parent == next(iter(records)) / RUNS for path in found):
        return _of_comparison(next(iter(records)), done, left_out)
    results, twice = _without_twins([Result(path, (), *_parts(path)) for path in done])
    return Collected(label(results), None, left_out + twice)


def _parts(path: Path) -> tuple[Any, ...]:
    values, summary, metrics = read_run(path)
    return values, (), (), summary, metrics


def _runs_in(folder: Path) -> list[Path]:
    if is_run(folder):
        return [folder]
    below = sorted(path for parent in (folder, folder / RUNS) if parent.is_dir() for path in parent.iterdir() if is_run(path))
    if not below:
        raise ConfigError(f"{folder}: no run folder, and none in it")
    return below


def _of_comparison(out: Path, done: Sequence[Path], left_out: list[str]) -> Collected:
    """With the labels, tuned values and stages that the comparison wrote down."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        entries, tune = record["runs"], record["tune"]
        results = [
            dataclasses.replace(
                Result(path, (), *_parts(path)),
                labels=tuple(entry["labels"].items()),
                tuned=tuple(entry["tuned"].items()),
                stages=tuple(entry["stages"]),
            )
            for path in done
            for entry in entries.get(path.name, [])
        ]
        axes = {key: tuple(values) for key, values in tune["values"].items()}
        tuning = Tuning(axes, tune["set"]) if axes else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{out / RECORD}: damaged: {error}") from None
    if not any(result.is_final for result in results):
        raise RunFailed(f"{out}: no final run is finished; lalora compare goes on from here")
    order = {name: place for place, name in enumerate(entries)}
    return Collected(sorted(results, key=lambda result: order[result.path.name]), tuning, left_out)


def _without_twins(results: Sequence[Result]) -> tuple[list[Result], list[str]]:
    """Seeded runs of the same settings are one run: counted twice they would look like less spread."""
    first: dict[str, Result] = {}
    kept, twice = [], []
    for result in results:
        shape = repr(sorted((k, v) for k, v in result.values.items() if k not in ("output-dir", "run-name", *PERFORMANCE)))
        if result.seeded and shape in first:
            twice.append(f"{result.path}: repeats {first[shape].path}")
            continue
        first.setdefault(shape, result)
        kept.append(result)
    return kept, twice


def label(results: Sequence[Result]) -> list[Result]:
    """Label runs that stand alone by the keys in which they differ.

    The learning rate is a label only where one method has several at the same ε: else it is a method's own.
    """
    hidden = {EPSILON, SEED, LR, *PERFORMANCE}
    keys = ["strategy", *(key for key in varying(results) if key not in hidden and key != "strategy")]
    plain = [_labelled(result, keys) for result in results]
    rates: dict[tuple[str, float], set[float]] = {}
    for result in plain:
        rates.setdefault((result.method, result.epsilon), set()).add(result.lr)
    if any(len(found) > 1 for found in rates.values()):
        keys.append(LR)
    return [_labelled(result, keys) for result in results]


def _labelled(result: Result, keys: Sequence[str]) -> Result:
    labels = [(key, label_of(result.values[key])) for key in keys if key in result.values]
    if EPSILON in result.values:
        labels.append((EPSILON, label_of(result.values[EPSILON])))
    return dataclasses.replace(result, labels=tuple(labels))
