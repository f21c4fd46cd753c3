"""From a grid to its runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lalora_flwr.compare.cells import Plan, make_cell, method_label, unique
from lalora_flwr.compare.grid import read_grid
from lalora_flwr.ground.errors import ConfigError
from tests.compare.made import BASE

RUNS = Path("out") / "runs"
SETS = [f"{key}={value}" for key, value in BASE.items() if key not in ("seed", "train.lr", "privacy.epsilon")]


def plan(*over: str, tune: tuple[str, ...] = (), text: str = "", folder: Path | None = None) -> Plan:
    path = None
    if folder:
        path = folder / "g.toml"
        path.write_text(text)
    made = Plan(read_grid(path, None, SETS, over, tune), RUNS)
    made.validate()
    return made


@given(
    st.lists(st.sampled_from(["la-lora", "dp-lora", "ffa-lora", "rolora"]), min_size=1, max_size=4, unique=True),
    st.lists(st.sampled_from(["1", "2", "8", "inf"]), min_size=1, max_size=3, unique=True),
    st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
    st.lists(st.sampled_from(["0.1", "0.2", "0.4"]), max_size=3, unique=True),
)
def test_every_combination_is_there_once(methods: list[str], eps: list[str], seeds: list[int], lrs: list[str]) -> None:
    over = [f"strategy={','.join(methods)}", f"privacy.epsilon={','.join(eps)}", f"seed={','.join(map(str, seeds))}"]
    made = plan(*over, tune=(f"train.lr={','.join(lrs)}",) if lrs else ())
    seen = [
        (s.strategy, s.privacy.epsilon, s.seed, s.train.lr) for s in (role.cell.settings for role in made.tuning or made.final)
    ]
    rates = [float(lr) for lr in lrs] or [0.0]
    assert sorted(seen) == sorted((m, float(e), s, lr) for m in methods for e in eps for s in seeds for lr in rates)
    assert len({cell.name for cell in unique(made.final)}) == len(seen)
    assert {r.cell for r in made.tuning} <= {r.cell for r in made.final}  # same seeds, nothing set: stage 1 serves stage 2
    assert len(made.rows()) == len(methods) * len(eps)
    assert bool(made.tuning) == bool(lrs)


def test_tuning_runs_have_their_own_seeds_and_keys(tmp_path: Path) -> None:
    text = "[tune]\ntrain.lr = [0.1, 0.2]\n[tuning]\nseed = [100]\nset = {train.batch-size = 30}"
    made = plan("strategy=la-lora,dp-lora", "seed=0,1,2", text=text, folder=tmp_path)
    assert {(r.cell.settings.seed, r.cell.settings.train.batch_size) for r in made.tuning} == {(100, 30)}
    assert {(r.cell.settings.seed, r.cell.settings.train.batch_size) for r in made.final} == {(0, 40), (1, 40), (2, 40)}
    assert len(made.tuning) == 4 and len(made.final) == 12  # final for whichever value wins


def test_a_cell_is_named_for_people_and_by_all_that_shapes_it() -> None:
    cell = make_cell({**BASE, "output-dir": "a", "run-name": "b"}, RUNS)
    assert cell.name.startswith("la-lora-eps3-lr0.3-seed0-") and len(cell.name.rpartition("-")[2]) == 8
    assert cell.settings.run_name == cell.name and cell.settings.output_dir == str(RUNS)
    assert make_cell({**BASE, "output-dir": "c"}, Path("elsewhere")).name == cell.name
    assert make_cell({**BASE, "lora.rank": 4}, RUNS).name == cell.name  # the default, named or not
    for key, value in {"lora.rank": 8, "privacy.delta": 1e-5, "data.beta": 2.0, "train.device": "cpu"}.items():
        assert make_cell({**BASE, key: value}, RUNS).name != cell.name, key
    assert make_cell({**BASE, "privacy.epsilon": math.inf}, RUNS).name.startswith("la-lora-epsinf-")


def test_cells_that_share_a_model_stay_together() -> None:
    made = plan("seed=0,1,2", "lora.rank=1,2")
    groups = [cell.group for cell in unique(made.final)]
    assert len(set(groups)) == 2 and groups == sorted(groups, key=groups.index)
    assert [cell.settings.seed for cell in unique(made.final)] == [0, 1, 2, 0, 1, 2]


def test_two_names_for_the_same_settings_are_one_run(tmp_path: Path) -> None:
    text = "[over]\nvariant = [{label='a', 'lora.rank'=4}, {label='b'}]"
    made = plan(text=text, folder=tmp_path)
    assert [role.method for role in made.final] == ["a", "b"] and len(unique(made.final)) == 1


def test_keys_that_cannot_go_together_are_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"train\.momentum = 0\.5"):
        plan("train.optimizer=sgd,adamw", "train.momentum=0.5")
    with pytest.raises(ConfigError, match=r"strategy = 'la-lorra'.*did you mean la-lora"):
        plan("strategy=dp-lora,la-lorra")


def test_a_method_is_called_by_all_compared_keys_but_epsilon_and_seed() -> None:
    assert method_label([("strategy", "dp-lora"), ("privacy.epsilon", "3"), ("lora.rank", "8")], "dp-lora") == "dp-lora, rank 8"
    assert method_label([("variant", "mine"), ("filter.name", "none")], "la-lora") == "mine, filter none"
    assert method_label([("train.lr", "0.1")], "rolora") == "rolora, lr 0.1"
    assert method_label([("train.lr", "0.1")], "rolora", without=["train.lr"]) == "rolora"
