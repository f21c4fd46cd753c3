"""The files of an adapter's folder. Needs no torch, so that a wrong folder is told within a second."""

from __future__ import annotations

from pathlib import Path

from lalora_flwr.ground.errors import ConfigError

KEY = "lora.start-from"
WEIGHTS, CONFIG, HEAD_FILE = "adapter_model.safetensors", "adapter_config.json", "head.safetensors"
PLAIN = "adapter.safetensors"  # of a form that PEFT does not know


def weights_of(folder: Path) -> Path:
    """The file with an adapter's tensors; ``folder`` is the adapter's own, or a run's that has one.

    Raises:
        ConfigError: there is none.
    """
    for place in (folder, folder / "adapter"):
        for name in (WEIGHTS, PLAIN):
            if (place / name).is_file():
                return place / name
    raise ConfigError(f"{KEY} = {str(folder)!r}: no adapter's folder; it must hold {WEIGHTS} or {PLAIN}")
