"""Settings: what is accepted, what is refused, and that the two places that hold defaults agree."""

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

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def refusal(flat: dict[str, Any]) -> str:
    """The one line with which the settings are refused."""
    with pytest.raises(ConfigError) as caught:
        settings_from(flat)
    text = str(caught.value)
    assert text and "\n" not in text
    return text


def test_every_setting_is_a_key_with_one_line_of_documentation() -> None:
    assert list(KEYS) == list(flatten(Settings()))
    for key in KEYS.values():
        assert key.doc.strip() and "\n" not in key.doc, key.name
        assert key.name == key.name.lower() and "_" not in key.name


def test_the_defaults_pass_their_own_checks() -> None:
    assert settings_from({key.name: key.default for key in KEYS.values()}) == Settings() == settings_from({})


def test_pyproject_holds_exactly_the_defaults() -> None:
    table = tomllib.loads(PYPROJECT.read_text())["tool"]["flwr"]["app"]["config"]
    flat = {
        (f"{name}.{inner}" if isinstance(value, dict) else name): (value[inner] if isinstance(value, dict) else value)
        for name, value in table.items()
        for inner in (value if isinstance(value, dict) else [""])
    }
    assert flat == {key.name: key.default for key in KEYS.values()}
    assert {name: type(value) for name, value in flat.items()} == {k.name: type(k.default) for k in KEYS.values()}


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("stratgy", "strategy"),
        ("num_rounds", "num-rounds"),
        ("privacy.epsilonn", "privacy.epsilon"),
        ("train.local_steps", "train.local-steps"),
        ("Lora.rank", "lora.rank"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(typo: str, meant: str) -> None:
    text = refusal({typo: 1})
    assert text.startswith(typo) and text.endswith(f"did you mean {meant}?")


def test_a_key_like_no_other_is_refused_with_the_way_to_the_list() -> None:
    assert "lalora keys" in refusal({"zzzzzz": 1})


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("num-rounds", True, "a whole number"),
        ("num-rounds", 2.0, "a whole number"),
        ("num-rounds", "2", "a whole number"),
        ("lora.rank", 1.5, "a whole number"),
        ("privacy.epsilon", "8", "a number"),
        ("privacy.epsilon", True, "a number"),
        ("train.lr", [0.1], "a number"),
        ("model.pretrained", 1, "true or false"),
        ("model.pretrained", "true", "true or false"),
        ("strategy", 3, "a text"),
        ("run-name", False, "a text"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(name: str, value: Any, kind: str) -> None:
    assert refusal({name: value}) == f"{name} = {value!r}: must be {kind}"


def test_a_whole_number_will_do_for_a_number() -> None:
    settings = settings_from({"privacy.epsilon": 3})
    assert settings.privacy.epsilon == 3.0 and type(settings.privacy.epsilon) is float


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora.rank", 0),
        ("lora.rank", -1),
        ("num-rounds", 0),
        ("num-supernodes", 0),
        ("max-failures", -1),
        ("seed", -1),
        ("fraction-train", 0.0),
        ("fraction-train", 1.1),
        ("fraction-train", math.nan),
        ("privacy.epsilon", -1.0),
        ("privacy.epsilon", 0.0),
        ("privacy.epsilon", math.nan),
        ("privacy.epsilon", -math.inf),
        ("privacy.delta", 0.0),
        ("privacy.delta", 1.0),
        ("privacy.delta", 2.0),
        ("privacy.delta", -1e-5),
        ("privacy.delta", math.nan),
        ("privacy.clip-norm", 0.0),
        ("privacy.clip-norm", math.inf),
        ("privacy.clip-norm", math.nan),
        ("privacy.accountant", "gdp"),
        ("privacy.max-rounds", -1),
        ("train.local-steps", 0),
        ("train.batch-size", 0),
        ("train.lr", 0.0),
        ("train.lr", math.inf),
        ("train.momentum", 1.0),
        ("train.weight-decay", -0.1),
        ("train.max-physical-batch", -1),
        ("train.num-threads", 0),
        ("train.optimizer", "lion"),
        ("lora.alpha", 0.0),
        ("lora.dropout", 1.0),
        ("lora.head", "open"),
        ("data.partition", "shard"),
        ("data.beta", 0.0),
        ("filter.name", "gauss"),
        # what only an attack on the arithmetic of a site could use
        ("lora.alpha", 4e-24),
        ("lora.alpha", 1e30),
        ("lora.rank", 10**6),
        ("train.lr", 1e24),
        ("train.lr", 1e-30),
        ("train.momentum", 0.9999999),
        ("train.weight-decay", 1e9),
        ("train.local-steps", 10**9),
        ("privacy.clip-norm", 1e-36),
        ("privacy.clip-norm", 1e-45),
        ("privacy.clip-norm", 1e38),
        ("privacy.delta", 1e-13),
        ("privacy.delta", 0.5),
        ("data.max-tokens", 10**9),
    ],
)
def test_an_impossible_value_is_refused_with_what_is_allowed(name: str, value: Any) -> None:
    text = refusal({name: value})
    assert text.partition("; did you mean")[0] == f"{name} = {value!r}: must be {KEYS[name].allowed}" and KEYS[name].allowed


@pytest.mark.parametrize(
    ("name", "value"), [("privacy.epsilon", math.inf), ("privacy.epsilon", 0.01), ("privacy.epsilon", 100.0), ("seed", 0)]
)
def test_the_ends_of_a_range_are_accepted(name: str, value: Any) -> None:
    assert flatten(settings_from({name: value}))[name] == value


def test_only_an_infinite_epsilon_is_not_private() -> None:
    assert settings_from({"privacy.epsilon": 100.0}).private
    assert not settings_from({"privacy.epsilon": math.inf}).private


def test_an_unknown_strategy_is_refused_with_the_known_ones_and_the_nearest() -> None:
    text = refusal({"strategy": "la-lor"})
    assert "strategy = 'la-lor'" in text and text.endswith("did you mean la-lora?")
    assert all(name in text for name in METHODS.names())
    assert "did you mean" not in refusal({"strategy": "zzz"})


@pytest.mark.parametrize("schedule", ["", "AB", "step:", "step:BC", "rounds:BA", "step:B A", "step:B0", "round:A0B0", "step:3B"])
def test_a_bad_schedule_is_refused(schedule: str) -> None:
    said = refusal({"lora.schedule": schedule})
    assert said.startswith(f"lora.schedule = {schedule!r}: must be ") and ":<pattern>" in said


@pytest.mark.parametrize("schedule", ["auto", "both", "A", "B", "step:AB", "step:BBA", "step:B3A2", "round:BA"])
def test_a_good_schedule_is_accepted(schedule: str) -> None:
    assert settings_from({"lora.schedule": schedule}).lora.schedule == schedule


def test_momentum_goes_with_sgd_only() -> None:
    assert refusal({"train.optimizer": "adamw", "train.momentum": 0.9}).startswith("train.momentum = 0.9")
    settings_from({"train.optimizer": "sgd", "train.momentum": 0.9})
    settings_from({"train.optimizer": "adamw", "train.momentum": 0.0})


def test_too_few_rounds_for_each_site_are_refused() -> None:
    flat = {"num-rounds": 4, "num-supernodes": 4, "fraction-train": 0.5}
    assert refusal({**flat, "privacy.max-rounds": 1}).startswith("privacy.max-rounds = 1: too few")
    assert settings_from({**flat, "privacy.max-rounds": 2}).rounds_per_site == 2


def test_the_noise_is_calibrated_for_the_rounds_a_site_may_serve_also_for_more_than_the_run_has() -> None:
    settings = settings_from({"num-rounds": 3, "privacy.max-rounds": 9, "train.local-steps": 5})
    assert (settings.rounds_per_site, settings.steps_per_site) == (9, 45)
    assert settings_from({"num-rounds": 3, "train.local-steps": 5}).steps_per_site == 15


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
    if key.allowed.startswith("one of "):
        return st.sampled_from(key.allowed.removeprefix("one of ").split(", ")).filter(key.check)
    kinds: dict[type, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(0, 10**6),
        float: st.floats(0, 100, exclude_min=True) | st.floats(0, 1) | st.just(math.inf),
        str: st.text(max_size=20),
    }
    return kinds[type(key.default)].filter(key.check)


ENTANGLED = ("model.name", "data.name", "data.answer")  # most of their values forbid others
ALLOWED = st.fixed_dictionaries({}, optional={key.name: values_of(key) for key in KEYS.values() if key.name not in ENTANGLED})


def accepted(flat: dict[str, Any]) -> Settings:
    """The settings, unless two of the values cannot go together."""
    try:
        return settings_from(flat)
    except ConfigError as problem:
        entangled = ("train.momentum", "privacy.max-rounds", "data.site", "min-sites", "run-name", "merge.name")
        assume(not str(problem).startswith(entangled))
        raise


@pytest.mark.parametrize(
    ("flat", "said"),
    [
        ({"data.name": "file:x.csv"}, "data.name = 'file:x.csv': embedded/vit-digits only takes digits"),
        ({"model.name": "hf/x"}, "model.name = 'hf/x': data.name = 'digits' holds images"),
        ({"model.name": "timm/x", "data.name": "hub:x", "data.answer": "(.*)"}, "data.answer: only for language modelling"),
        ({"model.name": "timm/x", "data.name": "sites", "data.labels": "a,b"}, "data.test: the server holds no records"),
        ({"model.name": "hf/x", "data.name": "sites", "data.test": "file:x"}, "data.labels: must name the classes"),
        ({"min-sites": 3, "num-supernodes": 2}, "min-sites = 3: only 2 sites are drawn for a round"),
        ({"merge.name": "median", "num-supernodes": 2}, "merge.name = 'median': needs 3 sites a round, but 2 are drawn"),
        ({"merge.name": "trimmed-mean", "merge.trim": 0.1}, "merge.name = 'trimmed-mean': needs 10 sites a round, but 4 are"),
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
