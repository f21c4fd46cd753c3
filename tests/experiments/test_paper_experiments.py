"""The files of experiments/paper: each can be planned without network or data, and a small sibling of each runs."""

from __future__ import annotations

import itertools
import math
import socket
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from lalora_flwr.compare.grid import Grid, read_grid
from lalora_flwr.data.data_set import DataSets
from lalora_flwr.engines.inline import run_inline
from lalora_flwr.server.plan import make_plan
from lalora_flwr.settings import Settings, read_toml, settings_from
from tests.conftest import strict_json
from tests.models.files import pairs, save_rows, sums, texts
from tests.models.folders import save_hf, save_timm

PAPER = Path(__file__).parents[2] / "experiments" / "paper"


def _names(pattern: str) -> list[str]:
    return sorted(path.stem for path in PAPER.glob(pattern))


SWIN, ROBERTA, LLAMA = _names("swin-*.toml"), _names("roberta_*.toml"), _names("llama*.toml")
EXPERIMENTS = [*SWIN, *ROBERTA, *LLAMA]
EPSILONS = (1.0, 2.0, 3.0)


def settings_of(name: str, **overrides: Any) -> Settings:
    return settings_from({**read_toml(PAPER / f"{name}.toml"), **overrides})


def test_every_file_is_an_experiment_or_a_grid() -> None:
    assert {path.stem for path in PAPER.iterdir()} == {*EXPERIMENTS, "grid_swin", "grid_roberta"}
    assert [len(SWIN), len(ROBERTA), len(LLAMA)] == [4, 4, 1]


@pytest.fixture
def _no_network_and_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a plan asked for the network or the data")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(DataSets, "_read", refuse)


def assert_planned(name: str, **overrides: Any) -> None:
    """The three budgets can be planned, and a smaller one takes more noise."""
    plans = [make_plan(settings_of(name, **{"privacy.epsilon": epsilon, **overrides})) for epsilon in EPSILONS]
    sigmas = [plan.mechanism.noise_multiplier for plan in plans]
    assert all(math.isfinite(sigma) and sigma > 0 for sigma in sigmas)
    assert sigmas == sorted(sigmas, reverse=True) and len(set(sigmas)) == 3
    for plan, epsilon in zip(plans, EPSILONS, strict=True):
        settings = settings_of(name, **{"privacy.epsilon": epsilon, **overrides})
        assert 0.95 * epsilon <= plan.epsilon_after(settings.num_rounds, settings) <= 1.001 * epsilon


@pytest.mark.usefixtures("_no_network_and_no_data")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_can_be_planned(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """With the quick accountant; `test_it_can_be_planned_as_it_is` takes the file's own."""
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_planned(name, **{"privacy.accountant": "rdp"})
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert [str(w.message) for w in caught if issubclass(w.category, FutureWarning)] == []


@pytest.mark.slow
@pytest.mark.usefixtures("_no_network_and_no_data")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_can_be_planned_as_it_is(name: str) -> None:
    assert_planned(name)


@pytest.mark.parametrize("name", [*SWIN, *ROBERTA])
def test_it_says_what_the_paper_says(name: str) -> None:
    settings = settings_of(name)
    rank, sites, beta, optimizer = (16, 8, 0.1, "sgd") if name in SWIN else (8, 20, 0.8, "adamw")
    assert (settings.lora.rank, settings.lora.alpha) == (rank, rank)
    assert (settings.num_supernodes, settings.num_rounds) == (sites, 100)
    assert (settings.data.partition, settings.data.beta) == ("dirichlet", beta)
    assert (settings.train.optimizer, settings.privacy.delta) == (optimizer, 1e-5)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_names_its_records_and_classes_so_that_no_data_is_needed(name: str) -> None:
    data = settings_of(name).data
    assert data.records > 0 and (data.num_classes > 0 or name in LLAMA)


FEW = {
    "num-supernodes": 2,
    "num-rounds": 2,
    "fraction-train": 1.0,
    "privacy.max-rounds": 2,
    "privacy.accountant": "rdp",
    "train.local-steps": 2,
    "train.batch-size": 8,
    "data.test": "hold-out:0.25",
    "data.records": 0,
    "data.min-records": 2,
    "run-name": "run",
}


def save_pictures(path: Path, label: str, classes: int) -> str:
    """Pictures with their class, as a Parquet file that knows all the names of the classes."""
    chance = np.random.default_rng(0)
    columns = datasets.Features({"image": datasets.Image(), label: datasets.ClassLabel(num_classes=classes)})
    pictures = [chance.integers(0, 256, (12, 12, 3), dtype=np.uint8) for _ in range(48)]
    table = datasets.Dataset.from_dict({"image": pictures, label: [i % classes for i in range(48)]}, features=columns)
    table.to_parquet(path)
    return f"file:{path}"


def renamed(rows: list[dict[str, Any]], names: dict[str, str]) -> list[dict[str, Any]]:
    return [{names.get(key, key): value for key, value in row.items()} for row in rows]


def small_sibling(name: str, folder: Path) -> dict[str, Any]:
    """The experiment's own values, with a tiny model and few records in place of its own."""
    flat = read_toml(PAPER / f"{name}.toml")
    if name in SWIN:
        save_timm(folder / "model", "swin")
        data = save_pictures(folder / "train.parquet", flat["data.label"], flat["data.num-classes"])
    elif name in LLAMA:
        save_hf(folder / "model", "llama", "causal")
        names = {"prompt": flat["data.text"], "more": flat["data.text-pair"], "response": flat["data.response"]}
        data = save_rows(folder / "train.jsonl", renamed(sums(40), names))
    else:
        save_hf(folder / "model", "roberta", "base")
        single = flat["data.text-pair"] == "none"
        rows = texts(40) if single else pairs(40, flat["data.num-classes"])
        names = {"sentence": flat["data.text"], "first": flat["data.text"], "second": flat["data.text-pair"]}
        data = save_rows(folder / "train.jsonl", renamed(rows, names))
    family = flat["model.name"].partition("/")[0]
    own = {"model.name": f"{family}/{folder / 'model'}", "data.name": data, "output-dir": str(folder)}
    return {**flat, **FEW, **own}


def assert_runs(name: str, folder: Path) -> None:
    path = run_inline(settings_from(small_sibling(name, folder)))
    summary = strict_json((path / "summary.json").read_text())
    assert summary["rounds"] == 2 and summary["failures"] == 0 and summary["private"]
    assert 0 <= summary["accuracy"] <= 1 and math.isfinite(summary["loss"]) and 0 < summary["epsilon"] <= 3.0
    assert ("f1" in summary) == (name not in LLAMA)


ONE_OF_EACH = ["swin-t_cifar100", "roberta_sst2", "roberta_mnli", "llama2-7b_alpaca"]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_small_sibling_of_each_family_runs(name: str, tmp_path: Path) -> None:
    assert_runs(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in ONE_OF_EACH])
def test_a_small_sibling_of_the_others_runs(name: str, tmp_path: Path) -> None:
    assert_runs(name, tmp_path)


GRIDS = [("grid_swin", name) for name in SWIN] + [("grid_roberta", name) for name in ROBERTA]


def cells(grid: Grid) -> list[Settings]:
    """Every combination that the grid compares or tunes over."""
    over = itertools.product(*([dict(option.values) for option in options] for options in grid.over.values()))
    tuned = [dict(zip(grid.tune, values, strict=True)) for values in itertools.product(*grid.tune.values())]
    return [
        settings_from({**grid.base, **{k: v for part in parts for k, v in part.items()}, **rate})
        for parts, rate in itertools.product(over, tuned)
    ]


@pytest.mark.parametrize(("grid", "name"), GRIDS)
def test_a_grid_compares_the_papers_methods_and_budgets_at_rates_of_the_experiments_optimizer(grid: str, name: str) -> None:
    read = read_grid(PAPER / f"{grid}.toml", PAPER / f"{name}.toml")
    every = cells(read)
    assert {cell.strategy for cell in every} == {"la-lora", "dp-lora", "ffa-lora", "rolora"}
    assert {cell.privacy.epsilon for cell in every} == set(EPSILONS)
    assert {cell.seed for cell in every} == {0, 1, 2} and not {0, 1, 2} & set(read.tuning_seeds)
    rates = sorted({cell.train.lr for cell in every})
    assert rates[0] < settings_of(name).train.lr < rates[-1]  # the file's own rate is not at the grid's edge
    assert all(cell.train.optimizer == ("sgd" if name in SWIN else "adamw") for cell in every)
    assert rates[0] >= 0.05 if name in SWIN else rates[-1] <= 0.01
