"""Run-config values as a person writes them: TOML files and ``-c key=value``."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from lalora_flwr.ground.errors import ConfigError


def flatten_toml(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in table.items():
        flat.update(flatten_toml(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


def read_toml(path: Path) -> dict[str, object]:
    """Flat values of a TOML experiment file (nested tables and dotted keys alike).

    Raises:
        ConfigError: if the file is missing or is not TOML.
    """
    try:
        return flatten_toml(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror or 'cannot be read'}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not valid TOML: {error}") from None


# A key, then a value in double quotes, in single quotes, or without either
_PAIR = re.compile(r"""([^\s=]+)=("(?:[^"\\]|\\.)*"|'[^']*'|[^\s'"]\S*|)(?=\s|$)""")


def parse_override(text: str) -> dict[str, object]:
    """Flat values of one ``-c`` argument: ``key=value`` pairs, separated by spaces, values as in TOML or bare words.

    Raises:
        ConfigError: if a part is not ``key=value``.
    """
    values: dict[str, object] = {}
    rest = text.strip()
    while rest:
        match = _PAIR.match(rest)
        if match is None:
            raise ConfigError(f"-c {rest}: must be key=value, with quotes around a value that holds spaces")
        name, raw = match.groups()
        if name in values:
            raise ConfigError(f"-c {name}: named twice")
        try:
            values[name] = tomllib.loads(f"v = {raw}")["v"]
        except tomllib.TOMLDecodeError:
            values[name] = raw  # a bare word: strategy=ffa-lora
        rest = rest[match.end() :].lstrip()
    return values
