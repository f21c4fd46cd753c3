"""Where a run's folder lies, and what became of the run in it. Nothing here needs torch."""

from __future__ import annotations

import dataclasses
import json
import shlex
from datetime import datetime
from pathlib import Path

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.files import expanded, is_locked
from lalora_flwr.server.metrics import CONFIG, FAILURE, SUMMARY
from lalora_flwr.settings import KEYS, Kind, Settings, flatten, read_toml, settings_from

LOCK = ".lock"
FINISHED = "which is finished"


def named(settings: Settings) -> Settings:
    """The settings with a run name, made from strategy, ε, seed and time if none was given."""
    if settings.run_name:
        return settings
    guarantee = f"eps{settings.privacy.epsilon:g}"
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return dataclasses.replace(settings, run_name=f"{settings.strategy}-{guarantee}-seed{settings.seed}-{stamp}")


def how_it_ended(path: Path) -> str:
    """What became of the run of a folder, in words; one that left neither summary nor failure was killed, or still runs."""
    if (path / SUMMARY).exists():
        return FINISHED
    if (path / FAILURE).exists():
        return f"which stopped ({_reason(path / FAILURE)})"
    return "whose process still runs" if is_locked(path / LOCK) else "whose process was killed"


def _reason(failure: Path) -> str:
    try:
        return str(json.loads(failure.read_text())["error"])
    except (OSError, ValueError, TypeError, KeyError):
        return f"{failure.name} cannot be read"


def folder_for(settings: Settings) -> Path:
    """Where the run's folder will be, or with ``resume`` is.

    Raises:
        ConfigError: if it holds a run already; with ``resume``: if it holds none, a finished one, or one of other settings.
    """
    path = expanded(settings.output_dir).absolute() / settings.run_name
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run-name = {settings.run_name!r}: {path} is there and is no folder; choose another name")
    if not settings.resume:
        if (path / CONFIG).exists():
            how = how_it_ended(path)
            go_on = "" if how == FINISHED else f", or go on with it by lalora run --resume {shlex.quote(str(path))}"
            raise ConfigError(f"run-name = {settings.run_name!r}: {path} holds a run already, {how}; choose another name{go_on}")
        return path
    if not (path / CONFIG).is_file():
        raise ConfigError(f"run-name = {settings.run_name!r}: {path} holds no run to resume")
    if (path / SUMMARY).exists():
        raise ConfigError(f"run-name = {settings.run_name!r}: {path} holds a finished run; there is nothing to resume")
    before, now = flatten(settings_from(read_toml(path / CONFIG))), flatten(settings)
    for key, value in now.items():
        if KEYS[key].kind is not Kind.PLACE and before[key] != value:
            raise ConfigError(f"{key} = {value!r}: the run to resume has {before[key]!r}; only an unchanged run goes on")
    return path
