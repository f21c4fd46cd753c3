"""What a run leaves on disk. Every file is written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tomli_w
from safetensors.torch import save

from lalora_flwr.config import Settings, flatten
from lalora_flwr.errors import ConfigError

PACKAGES = ("lalora-flwr", "flwr", "torch", "timm", "peft", "opacus")
METRICS, SUMMARY, FAILURE, CONFIG = "metrics.jsonl", "summary.json", "failure.json", "config.toml"
LOG = "flower.log"


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new, never a part."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def to_json(value: Any, **options: Any) -> str:
    """JSON that any reader takes: an infinite ε becomes null."""

    def clean(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: clean(part) for key, part in item.items()}
        if isinstance(item, list | tuple):
            return [clean(part) for part in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(clean(value), allow_nan=False, **options)


def versions() -> dict[str, str]:
    """Versions of the packages that shape a result."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def free_path(settings: Settings) -> Path:
    """Where the run's folder will be.

    Raises:
        ConfigError: if it holds a run already.
    """
    path = Path(settings.output_dir).absolute() / settings.run_name
    if (path / CONFIG).exists():
        raise ConfigError(f"run-name = {settings.run_name!r}: {path} holds a run already; choose another name")
    return path


class RunFolder:
    """``<output-dir>/<run-name>/`` with the files of design contract: config, metrics, checkpoint, adapter, summary."""

    def __init__(self, settings: Settings) -> None:
        """Make the folder and write the resolved settings.

        Raises:
            ConfigError: if the folder holds a run already, or cannot be made.
        """
        self.path = free_path(settings)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(self.path / CONFIG, tomli_w.dumps(_nested(flatten(settings))))
        except OSError as error:
            raise ConfigError(f"output-dir = {settings.output_dir!r}: {error.strerror}") from None
        self._lines: list[str] = []

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """One round's line."""
        self._lines.append(to_json(line) + "\n")
        write_whole(self.path / METRICS, "".join(self._lines))

    def save_checkpoint(self, server_round: int, state: Mapping[str, Any]) -> None:
        """The adapter after a round, and which round, in one file."""
        folder = self.path / "checkpoint"
        folder.mkdir(exist_ok=True)
        write_whole(folder / "adapter.safetensors", save(dict(state), metadata={"round": str(server_round)}))

    def save_adapter(self, model: Any) -> None:
        """The model's adapter as a folder that ``PeftModel.from_pretrained`` loads."""
        part, folder = self.path / ".adapter.part", self.path / "adapter"
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part, save_embedding_layers=False)
        (part / "README.md").unlink(missing_ok=True)  # PEFT's model card, a form to fill in
        part.replace(folder)

    def save_plot(self, name: str, figure: Any) -> None:
        """A matplotlib figure as ``plots/<name>.png``."""
        import io

        (self.path / "plots").mkdir(exist_ok=True)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
        write_whole(self.path / "plots" / f"{name}.png", picture.getvalue())

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The last file: its presence says that the run is complete."""
        write_whole(self.path / SUMMARY, to_json(summary, indent=2) + "\n")

    def fail(self, reason: str) -> None:
        """Why the run stopped, in one line."""
        write_whole(self.path / FAILURE, to_json({"error": reason}) + "\n")


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as tables, the form a person writes."""
    tables: dict[str, Any] = {}
    for name, value in flat.items():
        group, _, key = name.rpartition(".")
        (tables.setdefault(group, {}) if group else tables)[key] = value
    return tables
