"""What a grid file and the flags mean, and how each mistake in them is named."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lalora_flwr.compare.grid import Grid, read_grid
from lalora_flwr.ground.errors import ConfigError

FULL = """
config = "base.toml"
[set]
"num-rounds" = 20
train.local-steps = 5
[over]
strategy = ["la-lora", "ffa-lora"]
"privacy.epsilon" = [1, 3, inf]
seed = [0, 1, 2]
[tune.train]
lr = [1.0, 0.1, 0.3]
[tuning]
seed = [100]
set = {"train.batch-size" = 30, privacy.delta = 1e-5}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "grid.toml"
    path.write_text(text)
    return path


def labels(grid: Grid, axis: str) -> list[str]:
    return [option.label for option in grid.over[axis]]


def test_every_part_of_a_grid_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text("num-rounds = 3\n[lora]\nrank = 2\n")
    grid = read_grid(written(tmp_path, FULL))
    assert grid.base == {"num-rounds": 20, "lora.rank": 2, "train.local-steps": 5}
    assert list(grid.over) == ["strategy", "privacy.epsilon", "seed"]
    assert [option.values for option in grid.over["privacy.epsilon"]] == [
        {"privacy.epsilon": 1.0},
        {"privacy.epsilon": 3.0},
        {"privacy.epsilon": math.inf},
    ]
    assert labels(grid, "privacy.epsilon") == ["1", "3", "inf"]
    assert grid.tune == {"train.lr": (0.1, 0.3, 1.0)}  # ascending, whatever the file says
    assert grid.tuning_seeds == (100,)
    assert grid.tuning_set == {"train.batch-size": 30, "privacy.delta": 1e-5}


def test_a_variant_sets_several_keys_under_one_label(tmp_path: Path) -> None:
    text = """[over]
variant = [
  {label = "no filter", strategy = "la-lora", "filter.name" = "none"},
  {label = "wide", strategy = "dp-lora", lora = {rank = 8}},
]"""
    options = read_grid(written(tmp_path, text)).over["variant"]
    assert [(o.label, dict(o.values)) for o in options] == [
        ("no filter", {"strategy": "la-lora", "filter.name": "none"}),
        ("wide", {"strategy": "dp-lora", "lora.rank": 8}),
    ]


def test_flags_replace_an_axis_of_the_file_and_config_the_files_own(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("num-supernodes = 7\n")
    grid = read_grid(
        written(tmp_path, FULL),
        config=tmp_path / "mine.toml",  # the file's own base.toml does not exist
        overrides=["privacy.clip-norm=3 lora.rank=1"],
        over=["strategy=rolora", "seed=5,6"],
        tune=["train.lr=0.5"],
    )
    assert labels(grid, "strategy") == ["rolora"] and labels(grid, "seed") == ["5", "6"]
    assert labels(grid, "privacy.epsilon") == ["1", "3", "inf"]
    assert grid.tune == {"train.lr": (0.5,)}
    assert grid.base["num-supernodes"] == 7 and grid.base["privacy.clip-norm"] == 3 and grid.base["lora.rank"] == 1


def test_a_comma_between_quotes_belongs_to_the_value() -> None:
    grid = read_grid(over=["lora.targets='qkv,proj',\"fc1,fc2\",fc1"])
    assert labels(grid, "lora.targets") == ["qkv,proj", "fc1,fc2", "fc1"]


@given(st.lists(st.floats(1e-3, 10), min_size=1, max_size=6, unique=True))
def test_numbers_survive_the_flag(values: list[float]) -> None:
    if len({f"{v:g}" for v in values}) == len(values):
        grid = read_grid(over=[f"train.lr={','.join(map(repr, values))}"])
        assert [option.values["train.lr"] for option in grid.over["train.lr"]] == values


MISTAKES: dict[str, tuple[str, ...]] = {
    "[over]\nstrategi = ['la-lora']": ("strategi", "did you mean strategy?"),
    "[over]\nseed = 3": ("seed = 3", "a list"),
    "[over]\nseed = []": ("seed = []", "at least one"),
    "[over]\nseed = [0, 0]": ("seed", "'0' is listed twice"),
    "[over]\nseed = [0.5]": ("seed = 0.5", "a whole number"),
    "[over]\noutput-dir = ['a']": ("output-dir", "--out"),
    "[over]\nvariant = ['la-lora']": ("variant = 'la-lora'", "label"),
    "[over]\nvariant = [{strategy = 'la-lora'}]": ("variant", "label"),
    "[over]\nvariant = [{label = 'a', run-name = 'b'}]": ("run-name", "cannot vary"),
    "[over]\nvariant = [{label = 'a', lora.rank = 0}]": ("lora.rank = 0", "from 1 to 4096"),
    "[over]\nvariant = [{label = 'a', seed = 1}]\nseed = [0]": ("seed", "in a variant and is compared"),
    "[set]\nseed = 1\n[over]\nseed = [0]": ("seed", "is set and is compared"),
    "[over]\ntrain.lr = [1.0]\n[tune]\ntrain.lr = [1.0]": ("train.lr", "is compared and is tuned"),
    "[tune]\nseed = [1]": ("seed", "cannot be tuned"),
    "[tune]\nprivacy.epsilon = [1]": ("privacy.epsilon", "cannot be tuned"),
    "[over]\nseed = [1]\n[tuning]\nseed = [2]": ("[tuning]", "nothing to tune"),
    "[tune]\ntrain.lr = [1.0]\n[tuning]\nseeds = [2]": ("tuning", "seed, set or both"),
    "[tune]\ntrain.lr = [1.0]\n[tuning]\nset = {train.lr = 1.0}": ("train.lr", "tuning.set"),
    "[tune]\ntrain.lr = [1.0]\n[tuning]\nset = {seed = 1}": ("seed", "tuning.set"),
    "[set]\nlora.rank = 0": ("lora.rank = 0", "from 1 to 4096"),
    "[oven]\nseed = [1]": ("oven", "config, set, over, tune, tuning"),
    "over = 3": ("over = 3", "a table"),
    "config = 3": ("config = 3", "a path"),
    "config = 'missing.toml'": ("missing.toml", "No such file"),
    "a = \n": ("not valid TOML",),
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_in_the_file_is_named_in_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_grid(written(tmp_path, text))
    for part in MISTAKES[text]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("seed", "key=v1,v2"),
        ("seed=", "key=v1,v2"),
        ("seed=1,,2", "key=v1,v2"),
        ("seed=1,2,", "key=v1,v2"),
        ("=1,2", "key=v1,v2"),
        ("seed=1,'2", "quotes"),
        ("variant=a,b", "grid file"),
        ("seed=1,x", "seed = 'x'"),
    ],
)
def test_a_mistake_in_a_flag_is_named(flag: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        read_grid(over=[flag])


def test_a_missing_grid_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_grid(tmp_path / "none.toml")


def test_an_override_of_a_compared_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="strategy: is set and is compared"):
        read_grid(overrides=["strategy=la-lora"], over=["strategy=dp-lora"])
