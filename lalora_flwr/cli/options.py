"""Options that commands share, and how they become settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lalora_flwr.settings import Settings, parse_override, read_toml, settings_from

Override = Annotated[
    list[str] | None, typer.Option("--override", "-c", metavar="KEY=VALUE", help="Set a run-config key; repeatable.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file of run-config keys; -c wins over it.")]


def resolve(config: Path | None, overrides: list[str] | None) -> Settings:
    """Defaults, then the file, then the overrides.

    Raises:
        ConfigError: for the first thing that cannot be used.
    """
    flat: dict[str, object] = read_toml(config) if config else {}
    for text in overrides or []:
        flat.update(parse_override(text))
    return settings_from(flat)
