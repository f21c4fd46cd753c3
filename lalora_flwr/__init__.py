"""Federated LoRA fine-tuning under record-level differential privacy, as a Flower app."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lalora_flwr.ground.system import require_posix

require_posix()


def _version() -> str:
    """That of ``pyproject.toml``, which lies beside the package in a checkout and in Flower's bundle; else the installed one."""
    try:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        if project["name"] == "lalora-flwr":
            return str(project["version"])
    except (OSError, ValueError, KeyError):
        pass
    try:
        return version("lalora-flwr")
    except PackageNotFoundError:
        return "unknown"


__version__ = _version()
