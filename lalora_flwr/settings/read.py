"""Flat run-config values to typed settings and back. Flower hands the keys over flat (``context.run_config``)."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import Field, fields, is_dataclass
from functools import lru_cache
from typing import Any

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.words import is_text
from lalora_flwr.settings.keys import Key, Kind, Value
from lalora_flwr.settings.rules import check_choices, check_together
from lalora_flwr.settings.schema import Settings


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _group(f: Field[Any]) -> type:
    """The dataclass of a group of keys, which its own defaults make."""
    assert isinstance(f.default_factory, type)
    return f.default_factory


def _walk(cls: type, prefix: str = "") -> list[Key]:
    keys: list[Key] = []
    for f in fields(cls):
        if f.metadata:
            kind = f.metadata["kind"] or getattr(cls, "KIND", Kind.METHOD)
            keys.append(Key(**{**f.metadata, "name": prefix + _kebab(f.name), "default": f.default, "kind": kind}))
        else:
            keys += _walk(_group(f), f"{prefix}{_kebab(f.name)}.")
    return keys


KEYS: dict[str, Key] = {k.name: k for k in _walk(Settings)}


def keys_of(*kinds: Kind) -> frozenset[str]:
    """The names of the keys of some kinds."""
    return frozenset(name for name, key in KEYS.items() if key.kind in kinds)


MOST_WHOLE = int(sys.float_info.max)
WHOLE = 2**63  # Flower's messages hold no larger one


def _typed(key: Key, value: object) -> Value:
    want = type(key.default)
    if want is float and type(value) is int:
        value = float(value) if abs(value) <= MOST_WHOLE else value  # beyond, there is no float
    if type(value) is not want:
        kind = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[want]
        raise ConfigError(f"{key.name} = {value!r}: must be {kind}")
    if isinstance(value, str) and not is_text(value):
        raise ConfigError(f"{key.name} = {value!r}: holds half a character, which no file can; write it whole")
    if wanted := key.refusal(value):
        raise ConfigError(f"{key.name} = {value!r}: must be {wanted}")
    if type(value) is int and abs(value) >= WHOLE:
        raise ConfigError(f"{key.name} = {value!r}: must be a whole number below 2^63")
    return value


def check_values(flat: Mapping[str, object]) -> dict[str, Value]:
    """Check names, types and ranges of flat run-config values.

    Raises:
        ConfigError: one line naming the key, the value and what is allowed; for an unknown key the nearest known one.
    """
    checked: dict[str, Value] = {}
    for name, value in flat.items():
        if name not in KEYS:
            near = difflib.get_close_matches(name, KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else "`lalora keys` lists all keys"
            raise ConfigError(f"{name}: unknown key; {hint}")
        checked[name] = _typed(KEYS[name], value)
    return checked


def _build(cls: type, values: Mapping[str, Value], prefix: str = "") -> Any:
    arguments = {}
    for f in fields(cls):
        name = prefix + _kebab(f.name)
        if not f.metadata:
            arguments[f.name] = _build(_group(f), values, name + ".")
        elif name in values:
            arguments[f.name] = values[name]
    return cls(**arguments)


def settings_from(flat: Mapping[str, object], early: Callable[[Settings], None] = lambda settings: None) -> Settings:
    """Typed settings from flat run-config values; what is not named keeps its default.

    ``early`` may refuse them too, before the method and the data set are imported.

    Raises:
        ConfigError: for the first key that cannot be used, or for two keys that cannot go together.
    """
    settings: Settings = _build(Settings, check_values(flat))
    check_together(settings)
    early(settings)
    check_choices(settings)
    return settings


def settings_again(flat: Mapping[str, Value]) -> Settings:
    """As `settings_from`, remembered for the last few: a simulation's site gets the same ones with each message.

    Raises:
        ConfigError: as there.
    """
    return _remembered(tuple((name, type(value), value) for name, value in flat.items()))  # True is not 1


@lru_cache(maxsize=8)
def _remembered(items: tuple[tuple[str, type, Value], ...]) -> Settings:
    return settings_from({name: value for name, _, value in items})


def settings_kept(flat: Mapping[str, object]) -> Settings:
    """Typed settings as a finished run kept them: its method and data need not be here, and keys of other versions are left out.

    Raises:
        ConfigError: for the first value that no run can have had.
    """
    settings: Settings = _build(Settings, check_values({name: value for name, value in flat.items() if name in KEYS}))
    return settings


def flatten(settings: Any, prefix: str = "") -> dict[str, Value]:
    """All keys of the settings with their resolved values, flat."""
    flat: dict[str, Value] = {}
    for f in fields(settings):
        value = getattr(settings, f.name)
        name = prefix + _kebab(f.name)
        flat.update(flatten(value, name + ".") if is_dataclass(value) else {name: value})
    return flat
