"""Every key: its default, its type, its range, and the line that refuses another value."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.settings import KEYS, Settings, flatten, settings_again, settings_from
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
        ("train.lr", 1e-9),
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
        ("filter.name", "gaus"),
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


@pytest.mark.parametrize("name", ["train.weight-decay", "num-rounds", "seed"])
def test_a_whole_number_beyond_every_float_is_one_line(name: str) -> None:
    assert refusal({name: 10**400}).startswith(f"{name} = 1000") and ": must be a " in refusal({name: 10**400})


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
    settings_from({"train.optimizer": "adamw", "train.momentum": 0.0, "train.lr": 0.01})


def test_too_few_rounds_for_each_site_are_refused() -> None:
    flat = {"num-rounds": 4, "num-supernodes": 4, "fraction-train": 0.5}
    assert refusal({**flat, "privacy.max-rounds": 1}).startswith("privacy.max-rounds = 1: too few")
    assert settings_from({**flat, "privacy.max-rounds": 2}).rounds_per_site == 2


def test_the_noise_is_calibrated_for_the_rounds_a_site_may_serve_also_for_more_than_the_run_has() -> None:
    settings = settings_from({"num-rounds": 3, "privacy.max-rounds": 9, "train.local-steps": 5})
    assert (settings.rounds_per_site, settings.steps_per_site) == (9, 45)
    assert settings_from({"num-rounds": 3, "train.local-steps": 5}).steps_per_site == 15


def test_settings_that_are_remembered_are_checked_as_ever() -> None:
    flat = {"train.augmentations": 2, "train.flips": True, "train.lr": 1.0}
    assert settings_again(flat) == settings_from(flat) and settings_again(dict(flat)) is settings_again(flat)
    with pytest.raises(ConfigError, match="must be true or false"):
        settings_again({**flat, "train.flips": 1})
