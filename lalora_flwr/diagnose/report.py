"""Which runs a user means, what their columns are called, and what is written of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lalora_flwr.compare.collect import collect
from lalora_flwr.compare.results import Result, is_run
from lalora_flwr.diagnose.diagnosis import FILE, Diagnosis
from lalora_flwr.diagnose.figures import NAMES, figures
from lalora_flwr.diagnose.opened import opened
from lalora_flwr.diagnose.table import Column
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.extras import missing
from lalora_flwr.ground.figures import MODULE, SUFFIXES, rendered
from lalora_flwr.ground.files import PUBLIC, replace_file
from lalora_flwr.ground.words import epsilon_label
from lalora_flwr.server.folder import to_json


def chosen(folders: Iterable[Path]) -> tuple[list[Result], list[str]]:
    """The finished runs in or below the folders, and what was left out and why.

    Raises:
        ConfigError: a folder holds no run, or a damaged one.
        RunFailed: a run that was named is not finished, or none of a folder is.
    """
    folders = list(folders)
    for folder in folders:
        if is_run(folder):
            opened(folder)
    found = collect(folders)
    return [result for result in found.results if result.is_final], found.left_out


def named(results: Sequence[Result], *, over_seeds: bool) -> dict[str, list[Result]]:
    """The results by the name of their column: what they differ in."""
    epsilons, seeds = ({result.values[key] for result in results} for key in ("privacy.epsilon", "seed"))
    columns: dict[str, list[Result]] = {}
    for result in results:
        parts = [result.method, epsilon_label(result.epsilon) if len(epsilons) > 1 else ""]
        if len(seeds) > 1 and not over_seeds:
            parts.append(f"seed {result.values['seed']}")
        name = ", ".join(part for part in parts if part)
        if name in columns and not over_seeds:  # alike in all that tells runs apart
            name = f"{name}, {result.path.name}"
        columns.setdefault(name, []).append(result)
    return columns


def write(folder: Path, columns: Sequence[Column]) -> None:
    """``diagnosis.json`` and ``plots/diagnosis-*``, each whole or not at all; pictures of an earlier diagnosis go.

    Without matplotlib there are no pictures.

    Raises:
        ConfigError: the folder cannot be written.
    """
    content = {"runs": [{"column": column.name, **run.to_json()} for column in columns for run in column.runs]}
    try:
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        replace_file(folder / FILE, to_json(content, indent=2) + "\n", mode=PUBLIC)
        shown = () if missing(MODULE, "plots") else figures(columns)
        drawn = {name + suffix: data for name, figure in shown for suffix, data in rendered(figure).items()}
        for name, data in drawn.items():
            replace_file(folder / "plots" / name, data, mode=PUBLIC)
        for name in {name + suffix for name in NAMES for suffix in SUFFIXES} - drawn.keys():
            (folder / "plots" / name).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from None


def columns_of(names: dict[str, list[Result]], diagnoses: dict[Path, Diagnosis]) -> list[Column]:
    """The columns with the diagnoses of their runs."""
    return [Column(name, tuple(diagnoses[result.path] for result in results)) for name, results in names.items()]
