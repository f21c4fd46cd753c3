"""The adapter of the round that did best on public records, kept beside the last one's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from lalora_flwr.ground.errors import RunFailed
from lalora_flwr.ground.files import PUBLIC, replace_file
from lalora_flwr.server.metrics import Quality, headline


class Best:
    """Which round did best so far. A file holds its adapter, so that it outlives the process; the checkpoint names the round.

    Choosing by public records costs no ε. It does make the figure of the chosen round look better than it is.

    Attributes:
        round: its number; 0: none was evaluated yet.
        quality: of its adapter.
    """

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: for the file.
        """
        self._folder = folder
        self.round, self.quality = 0, dict[str, float | None]()

    def _file(self) -> Path:
        return self._folder / f"best-{self.round}.safetensors"

    def look(self, server_round: int, quality: Quality, adapter: Mapping[str, Tensor]) -> None:
        """Take a round's adapter if none before it did better; of two alike the later one is kept.

        Args:
            server_round: its number, from 1.
            quality: of the adapter; a round that was not evaluated is not looked at.
            adapter: all of it, by name.
        """
        metric = headline(quality)
        score, before = quality.get(metric), self.quality.get(metric)
        if score is None or not math.isfinite(score) or (before is not None and score < before):
            return
        self.round, self.quality = server_round, dict(quality)
        self._folder.mkdir(exist_ok=True)
        replace_file(self._file(), save({name: value.contiguous() for name, value in adapter.items()}), mode=PUBLIC)

    def tidy(self) -> None:
        """Remove what is no longer the best; to be called when the checkpoint names the one that is."""
        for path in self._folder.glob("best-*.safetensors"):
            if path != self._file():
                path.unlink(missing_ok=True)

    def adapter(self) -> dict[str, Tensor]:
        """Of the best round.

        Raises:
            RunFailed: its file is damaged or gone.
        """
        try:
            return load_file(self._file())
        except Exception as error:  # safetensors raises its own
            raise RunFailed(f"{self._file()} is damaged ({type(error).__name__}); the run cannot go on from it") from None

    def state(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        return {"round": self.round, "quality": self.quality}

    def restore(self, state: Mapping[str, Any]) -> None:
        """What `state` gave; empty for a checkpoint of an older version."""
        self.round, self.quality = state.get("round", 0), dict(state.get("quality", {}))
