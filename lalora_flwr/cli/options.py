"""Options that commands share, and how they become settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.files import check_place
from lalora_flwr.settings import Settings, parse_override, read_toml, settings_from

Override = Annotated[
    list[str] | None, typer.Option("--override", "-c", metavar="KEY=VALUE", help="Set a run-config key; repeatable.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file of run-config keys; -c wins over it.")]


def resolve(
    config: Path | None, overrides: list[str] | None, early: Callable[[Settings], None] = lambda settings: None
) -> Settings:
    """Defaults, then the file, then the overrides; ``early`` as in `settings_from`.

    Raises:
        ConfigError: for the first thing that cannot be used.
    """
    flat: dict[str, object] = read_toml(config) if config else {}
    given: dict[str, object] = {}
    for text in overrides or []:
        new = parse_override(text)
        if twice := next((name for name in new if name in given), ""):
            raise ConfigError(f"-c {twice}: named twice")
        given.update(new)
    return settings_from({**flat, **given}, early)


def check_out(out: Path | None) -> None:
    """Refuse a place where the result could not be written, before the attack.

    Raises:
        ConfigError: it is one.
    """
    if out:
        try:
            check_place(out)
        except (OSError, ValueError) as fault:
            reason = fault.strerror if isinstance(fault, OSError) and fault.strerror else fault
            raise ConfigError(f"{out}: the result cannot be written there: {reason}; name another file with --out") from None
