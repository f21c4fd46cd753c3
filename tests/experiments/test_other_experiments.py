"""The files behind docs/results.md: each names settings that can run."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from lalora_flwr.compare.grid import read_grid
from lalora_flwr.settings import read_toml, settings_from
from tests.experiments.test_paper_experiments import cells

FOLDER = Path(__file__).parents[2] / "experiments"
FILES = sorted(path for part in ("real", "ablations") for path in (FOLDER / part).glob("*.toml"))
GRIDS = [path for path in FILES if "over" in tomllib.loads(path.read_text())]


@pytest.mark.parametrize("path", [path for path in FILES if path not in GRIDS], ids=lambda path: path.stem)
def test_settings_can_run(path: Path) -> None:
    settings_from(read_toml(path))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_each_cell_of_a_grid_can_run_and_is_tuned_and_tested_with_different_seeds(path: Path) -> None:
    grid = read_grid(path)
    every = cells(grid)
    assert len(every) > 1 and len({cell.seed for cell in every}) >= 3
    if not grid.tune:  # a rate by rule, all rates shown, or that of which another grid found that it is best
        known = path.stem == "claims_one_step"
        assert known or all(not cell.train.lr or cell.train.local_steps > 1 for cell in every)
        return
    assert len(grid.tuning_seeds) and not {cell.seed for cell in every} & set(grid.tuning_seeds)
    assert {cell.train.lr for cell in every} == set(grid.tune["train.lr"])


def test_every_grid_of_the_results_is_named_there() -> None:
    results = (FOLDER.parent / "docs" / "results.md").read_text()
    assert not [path.name for path in GRIDS if path.name not in results]
