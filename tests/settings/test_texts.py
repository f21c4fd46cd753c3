"""Files and overrides as a person writes them, and settings written and read again."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import assume, given
from hypothesis import strategies as st

from lalora_flwr.cli.options import resolve
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.server.folder import RunFolder
from lalora_flwr.settings import KEYS, Key, Settings, flatten, parse_override, read_toml, settings_from
from lalora_flwr.settings.choices import METHODS


def test_a_file_may_nest_its_keys_or_dot_them(tmp_path: Path) -> None:
    nested, dotted = tmp_path / "nested.toml", tmp_path / "dotted.toml"
    nested.write_text('strategy = "dp-lora"\n[privacy]\nepsilon = inf\n[train]\nlr = 1\n')
    dotted.write_text('strategy = "dp-lora"\nprivacy.epsilon = inf\ntrain.lr = 1\n')
    flat = {"strategy": "dp-lora", "privacy.epsilon": math.inf, "train.lr": 1}
    assert read_toml(nested) == read_toml(dotted) == flat


@pytest.mark.parametrize("content", [b"a = ", b"= 3", b"[", b"\xff\xfe"])
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not valid TOML") as caught:
        read_toml(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(ConfigError, match="--config"):
            read_toml(path)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("strategy=ffa-lora", {"strategy": "ffa-lora"}),
        ("strategy='ffa-lora'", {"strategy": "ffa-lora"}),
        ('strategy="ffa-lora" num-rounds=2', {"strategy": "ffa-lora", "num-rounds": 2}),
        ("  seed=1   train.lr=0.5\tmodel.pretrained=false ", {"seed": 1, "train.lr": 0.5, "model.pretrained": False}),
        ("run-name='a b = c' seed=3", {"run-name": "a b = c", "seed": 3}),
        ('run-name="it\'s"', {"run-name": "it's"}),
        ("privacy.epsilon=inf", {"privacy.epsilon": math.inf}),
        ("train.lr=1e-3", {"train.lr": 1e-3}),
        ("lora.schedule=step:BA", {"lora.schedule": "step:BA"}),
        ("output-dir=/tmp/a#b", {"output-dir": "/tmp/a#b"}),
        ("run-name=", {"run-name": ""}),
        ("", {}),
    ],
)
def test_an_override_is_read_as_toml_or_as_a_bare_word(text: str, values: dict[str, Any]) -> None:
    read = parse_override(text)
    assert read == values
    assert {name: type(value) for name, value in read.items()} == {name: type(value) for name, value in values.items()}


@pytest.mark.parametrize("text", ["strategy", "=3", "seed=1 rank", "num-rounds = 2", "run-name='open", 'run-name="open'])
def test_an_override_that_is_not_a_pair_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^-c "):
        parse_override(text)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("seed = 1\nnum-rounds = 7\nlora.rank = 5\n")
    settings = resolve(path, ["seed=3", "num-rounds=8"])
    assert (settings.seed, settings.num_rounds, settings.lora.rank) == (3, 8, 5)


def values_of(key: Key) -> st.SearchStrategy[Any]:
    """Values that the key allows."""
    if key.name == "strategy":
        return st.sampled_from(sorted(METHODS.names()))
    if key.name == "lora.schedule":
        return st.sampled_from(["auto", "both", "B", "step:BBA", "round:BA"])
    if key.name == "filter.name":
        return st.sampled_from(
            ["auto", "none", "gauss5", "gauss:7", "gauss-permuted:3", "doppler", "disk:0.25", "kalman:0.6", "wiener"]
        )
    if key.allowed.startswith("one of "):
        return st.sampled_from(key.allowed.removeprefix("one of ").split(", ")).filter(key.check)
    kinds: dict[type, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(0, 10**6),
        float: st.floats(0, 100, exclude_min=True) | st.floats(0, 1) | st.just(math.inf),
        str: st.text(max_size=20),
    }
    return kinds[type(key.default)].filter(key.check)


ENTANGLED = (
    "model.name",
    "data.name",
    "data.answer",
    "data.labels",
    "data.problem-type",
    "data.label-range",
    "trust",
    "colluders",
    "profiles",
    "train.step-at",
    "train.decay",
    "train.flips",
)  # most of their values forbid others


ONE_STEP = {"train.local-steps": 1}
OF_FORMS = ("lora.form", "lora.size", "merge.travel")  # whose values few strategies take
OTHER_FORMS = ("bitfit", "bottleneck", "soft-prompt", "visual-prompt", "pixel-prompt", "head-only")  # nor most keys of lora.*


def with_factors(flat: dict[str, Any]) -> dict[str, Any]:
    """Without a strategy that trains something else."""
    return {name: value for name, value in flat.items() if name != "strategy" or value not in OTHER_FORMS}


KEYS_DRAWN = [key for key in KEYS.values() if key.name not in (*ENTANGLED, *OF_FORMS)]
ALLOWED = st.fixed_dictionaries({}, optional={key.name: values_of(key) for key in KEYS_DRAWN}).map(with_factors)


def accepted(flat: dict[str, Any]) -> Settings:
    """The settings, unless two of the values cannot go together."""
    try:
        return settings_from(flat)
    except ConfigError as problem:
        entangled = (
            "lora.",
            "train.momentum",
            "train.lr",
            "privacy.max-rounds",
            "data.site",
            "min-sites",
            "run-name",
            "merge.name",
            "merge.travel",
            "filter.name",
            "data.num-classes",
            "num-supernodes",
        )
        assume(not str(problem).startswith(entangled) and "for strategy = " not in str(problem))
        raise


@pytest.mark.parametrize(
    ("flat", "said"),
    [
        ({"data.name": "file:x.csv"}, "data.name = 'file:x.csv': embedded/vit-digits only takes digits"),
        ({"model.name": "hf/x"}, "model.name = 'hf/x': data.name = 'digits' holds images"),
        ({"model.name": "timm/x", "data.name": "hub:x", "data.answer": "(.*)"}, "data.answer: only for language modelling"),
        ({"model.name": "timm/x", "data.name": "sites", "data.labels": "a,b"}, "data.test: the server holds no records"),
        ({"model.name": "hf/x", "data.name": "sites", "data.test": "file:x"}, "data.labels: must name the classes"),
        ({"data.problem-type": "regression", "data.labels": "a"}, "data.label-range: must give the bounds of the numbers"),
        ({"data.problem-type": "regression", "data.label-range": "0,1", "data.labels": "a"}, "data.labels: only for classes"),
        ({"data.problem-type": "regression", "data.label-range": "0,1", "data.num-classes": 2}, "data.num-classes: only for"),
        ({"data.problem-type": "multi-label", "data.label-range": "0,1"}, "data.label-range = '0,1': only for data.problem-type"),
        ({"data.labels": "a,b", "data.num-classes": 3}, "data.num-classes = 3: data.labels names 2 classes"),
        ({"data.labels": "a,b"}, "data.labels = 'a,b': must be '0,1,2,3,4,5,6,7,8,9' or empty for data.name = 'digits'"),
        ({"data.labels": "a, a"}, "data.labels = 'a, a': a class occurs twice"),
        ({"data.label-range": "0,1_0"}, "data.label-range = '0,1_0': must be low,high"),
        ({"data.label-range": "1,0"}, "data.label-range = '1,0': must be low,high: two numbers, the smaller first"),
        ({"data.label-range": "nan,1"}, "data.label-range = 'nan,1': must be low,high"),
        ({"data.problem-type": "multi-label", "data.partition": "shards"}, "data.partition = 'shards': needs one class per"),
        (
            {"data.problem-type": "multi-label"},
            "data.problem-type = 'multi-label': must be 'single-label' for data.name = 'digits'",
        ),
        (
            {"model.name": "hf/x", "data.name": "hub:x", "data.problem-type": "multi-label", "data.response": "r"},
            "data.problem-type",
        ),
        ({"min-sites": 3, "num-supernodes": 2}, "min-sites = 3: only 2 sites are drawn for a round"),
        ({"merge.name": "median", "num-supernodes": 2}, "merge.name = 'median': needs 3 sites a round, but 2 are drawn"),
        ({"merge.name": "trimmed-mean", "merge.trim": 0.1}, "merge.name = 'trimmed-mean': needs 10 sites a round, but 4 are"),
        ({"trust": "secure-sum"}, "train.local-steps = 10: must be 1 for trust = 'secure-sum'; raise num-rounds"),
        ({"train.step-at": "server"}, "train.local-steps = 10: must be 1 for train.step-at = 'server'"),
        ({"trust": "secure-sum", "train.step-at": "site"}, "train.step-at = 'site': must be 'server' or 'auto'"),
        ({"train.decay": "linear"}, "train.decay = 'linear': only where the server steps"),
        ({**ONE_STEP, "trust": "secure-sum", "privacy.epsilon": math.inf}, "trust = 'secure-sum': shares noise, of which"),
        ({**ONE_STEP, "trust": "secure-sum", "colluders": 4}, "colluders = 4: must be below the 4 sites of a round"),
        ({**ONE_STEP, "trust": "secure-sum", "num-supernodes": 500}, "trust = 'secure-sum': at most 256 sites a round"),
        ({**ONE_STEP, "trust": "secure-sum", "merge.name": "median"}, "merge.name = 'median': needs every site's update"),
        ({**ONE_STEP, "trust": "secure-sum", "merge.max-update-norm": 1.0}, "merge.max-update-norm = 1: secure-sum hides"),
        ({"resume": True}, "run-name: must name the run"),
        ({"data.partition": "natural"}, "data.site: must name the column"),
    ],
)
def test_keys_that_cannot_go_together_are_refused_with_what_to_do(flat: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        settings_from(flat)


@given(ALLOWED)
def test_flatten_and_settings_from_are_each_others_inverse(flat: dict[str, Any]) -> None:
    settings = accepted(flat)
    whole = flatten(settings)
    assert whole == {**{key.name: key.default for key in KEYS.values()}, **flat}
    assert settings_from(whole) == settings


@given(ALLOWED)
def test_settings_survive_the_toml_that_a_run_writes(flat: dict[str, Any]) -> None:
    from lalora_flwr.server.folder import _nested

    settings = accepted(flat)
    text = tomli_w.dumps(_nested(flatten(settings)))
    assert settings_from(flatten_again(tomllib.loads(text))) == settings


def flatten_again(table: dict[str, Any]) -> dict[str, Any]:
    tables = {name: value for name, value in table.items() if isinstance(value, dict)}
    flat = {name: value for name, value in table.items() if name not in tables}
    return flat | {f"{group}.{name}": value for group, values in tables.items() for name, value in values.items()}


def test_a_runs_own_config_repeats_the_run(tmp_path: Path) -> None:
    settings = settings_from(
        {"output-dir": str(tmp_path), "run-name": "a", "privacy.epsilon": math.inf, "lora.schedule": "step:B3A2"}
    )
    folder = RunFolder(settings)
    assert resolve(folder.path / "config.toml", None) == settings


@pytest.mark.parametrize("name", ["../other", "a/b", "..", ".hidden"])
def test_a_run_name_cannot_leave_the_output_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="run-name"):
        settings_from({"run-name": name})
