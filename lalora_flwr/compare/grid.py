"""What to compare: the grid file and the flags that win over it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.settings import KEYS, Kind, Value, check_values, flatten_toml, keys_of, parse_override, read_toml

Item = TypeVar("Item")
VARIANT, SEED, EPSILON, LR = "variant", "seed", "privacy.epsilon", "train.lr"
RESERVED = keys_of(Kind.PLACE)  # the comparison names its folders itself


@dataclass(frozen=True)
class Option:
    """One place on an axis: how tables call it, and the keys it sets."""

    label: str
    values: Mapping[str, Value]


@dataclass(frozen=True)
class Grid:
    """A comparison. Every combination of ``over`` is compared; ``tune`` is chosen for each of them, apart from the seed.

    ``tuning_seeds`` and ``tuning_set`` hold only while tuning; numbers on a ``tune`` axis ascend.
    """

    base: Mapping[str, object] = field(default_factory=dict)
    over: Mapping[str, tuple[Option, ...]] = field(default_factory=dict)
    tune: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    tuning_seeds: tuple[int, ...] = ()
    tuning_set: Mapping[str, Value] = field(default_factory=dict)


def read_grid(
    path: Path | None = None,
    config: Path | None = None,
    overrides: Iterable[str] = (),
    over: Iterable[str] = (),
    tune: Iterable[str] = (),
) -> Grid:
    """The comparison that a grid file and the flags describe.

    Args:
        path: the grid file.
        config: base run settings; wins over the file's own ``config``.
        overrides: ``key=value`` texts, as for ``lalora run``.
        over, tune: ``key=v1,v2,...`` texts; each replaces the file's axis of that key.

    Raises:
        ConfigError: for the first thing that cannot be used; keys that need each other are checked with the cells.
    """
    content = _read(path) if path else {}
    if path and "config" in content:
        if not isinstance(content["config"], str):
            raise ConfigError(f"--grid {path}: config = {content['config']!r}: must be a path in quotes")
        config = config or path.parent / content["config"]
    base = read_toml(config) if config else {}
    fixed: dict[str, object] = dict(_table(content, "set"))
    for text in overrides:
        fixed.update(parse_override(text))
    axes = {name: _options(name, values) for name, values in _table(content, "over").items()}
    axes.update((name, _options(name, values)) for name, values in map(_axis, over))
    tuned = {name: _tuned(name, values) for name, values in _table(content, "tune").items()}
    tuned.update((name, _tuned(name, values)) for name, values in map(_axis, tune))
    seeds, only_tuning = _tuning(content)
    _refuse_overlap(fixed, axes, tuned, only_tuning)
    if (seeds or only_tuning) and not tuned:
        raise ConfigError("[tuning]: there is nothing to tune; name the values in [tune] or with --tune")
    return Grid({**base, **fixed}, axes, tuned, seeds, only_tuning)


def grid_of(base: Mapping[str, object], over: Mapping[str, Sequence[object]], tune: Mapping[str, Sequence[object]]) -> Grid:
    """The comparison that values describe.

    Args:
        base: keys that all runs have in common.
        over, tune: keys and their values.

    Raises:
        ConfigError: for the first thing that cannot be used.
    """
    axes = {name: _options(name, list(values)) for name, values in over.items()}
    tuned = {name: _tuned(name, list(values)) for name, values in tune.items()}
    if not axes and not tuned:
        raise ConfigError("nothing to compare: name keys and their values")
    _refuse_overlap(base, axes, tuned, {})
    return Grid(dict(base), axes, tuned)


def _read(path: Path) -> dict[str, object]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--grid {path}: {error.strerror or 'cannot be read'}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--grid {path}: not valid TOML: {error}") from None
    parts = ("config", "set", "over", "tune", "tuning")
    for name in content:
        if name not in parts:
            raise ConfigError(f"--grid {path}: {name}: unknown; a grid file has {', '.join(parts)}")
    return content


def _table(content: Mapping[str, object], name: str) -> dict[str, object]:
    """A table of the grid file with flat keys; lists, also those of variants, stay as they are."""
    table = content.get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{name} = {table!r}: must be a table of run-config keys")
    return flatten_toml(table)


def _checked(name: str, value: object) -> Value:
    if name in RESERVED:
        raise ConfigError(f"{name}: cannot vary; a comparison names its folders itself (see --out)")
    return check_values({name: value})[name]


def _listed(name: str, values: object) -> list[object]:
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{name} = {values!r}: must be a list of at least one value")
    return values


def _options(name: str, values: object) -> tuple[Option, ...]:
    if name == VARIANT:
        options = [_variant(value) for value in _listed(name, values)]
    else:
        checked = [_checked(name, value) for value in _listed(name, values)]
        options = [Option(label_of(value), {name: value}) for value in checked]
    return tuple(_no_twice(name, options, [option.label for option in options]))


def label_of(value: Value) -> str:
    """A value as tables and file names show it."""
    if value == "":
        return "(empty)"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _variant(value: object) -> Option:
    if not isinstance(value, dict) or not isinstance(value.get("label"), str) or not value["label"].strip():
        raise ConfigError(f"variant = {value!r}: must be a table with a label and the keys it sets")
    flat = flatten_toml({name: part for name, part in value.items() if name != "label"})
    return Option(value["label"].strip(), {name: _checked(name, part) for name, part in flat.items()})


def _tuned(name: str, values: object) -> tuple[Value, ...]:
    if name in (SEED, EPSILON, VARIANT):
        raise ConfigError(f"{name}: cannot be tuned; compare over it")
    checked = [_checked(name, value) for value in _listed(name, values)]
    numeric = all(isinstance(value, int | float) for value in checked)
    return tuple(_no_twice(name, sorted(checked) if numeric else checked, [label_of(value) for value in checked]))


def _no_twice(name: str, items: list[Item], labels: list[str]) -> list[Item]:
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"{name}: {label!r} is listed twice")
    return items


# Commas part values, except between quotes
_PART = re.compile(r"""((?:"(?:[^"\\]|\\.)*"|'[^']*'|[^,'"])*)(?:,|$)""")


def _axis(text: str) -> tuple[str, list[object]]:
    name, equals, rest = text.partition("=")
    name = name.strip()
    if name == VARIANT:
        raise ConfigError("variant: sets several keys at once, which only a grid file can say")
    if not equals or not re.fullmatch(r"\S+", name):
        raise ConfigError(f"{text}: must be key=v1,v2,...")
    parts, at = [], 0
    while at <= len(rest):
        match = _PART.match(rest, at)
        if match is None or not match[1].strip():
            raise ConfigError(f"{text}: must be key=v1,v2,... with quotes around a value that holds a comma")
        parts.append(match[1].strip())
        at = match.end() + (match.end() == len(rest) and not match[0].endswith(","))
    return name, [parse_override(f"{name}={part}")[name] for part in parts]


def _tuning(content: Mapping[str, object]) -> tuple[tuple[int, ...], dict[str, Value]]:
    table = content.get("tuning", {})
    if not isinstance(table, dict) or not set(table) <= {SEED, "set"}:
        raise ConfigError(f"tuning = {table!r}: must be a table that has seed, set or both")
    seeds = _options(SEED, table[SEED]) if SEED in table else ()
    only_tuning = {name: _checked(name, value) for name, value in _table(table, "set").items()}
    return tuple(int(option.values[SEED]) for option in seeds), only_tuning


def _refuse_overlap(
    fixed: Mapping[str, object],
    over: Mapping[str, tuple[Option, ...]],
    tune: Mapping[str, object],
    only_tuning: Mapping[str, object],
) -> None:
    """A key has one place only: which of two should win is nothing to guess."""
    taken: dict[str, str] = {}
    check_values({name: value for name, value in fixed.items() if name in KEYS or name not in RESERVED})
    places = [(name, "is set") for name in fixed if name not in RESERVED]
    for axis, options in over.items():
        names = dict.fromkeys(name for option in options for name in option.values)
        places += [(name, "is in a variant" if axis == VARIANT else "is compared") for name in names]
    places += [(name, "is tuned") for name in tune]
    for name, place in places:
        if name in taken:
            raise ConfigError(f"{name}: {taken[name]} and {place}; name it in one place")
        taken[name] = place
    for name in only_tuning:
        if taken.get(name, "is set") != "is set" or name == SEED:
            raise ConfigError(f"{name}: in tuning.set, but it varies; tuning.set holds fixed keys (tuning.seed has the seeds)")
