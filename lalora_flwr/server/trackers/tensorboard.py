"""``track = "tensorboard"``: event files in the run's own folder; `tensorboard --logdir runs` shows all runs side by side."""

from __future__ import annotations

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from lalora_flwr.server.metrics import RoundMetrics, Summary
from lalora_flwr.server.trackers.tracker import config_of, finite
from lalora_flwr.settings import Settings


class TensorBoard:
    """Writes ``tensorboard/`` in the run's folder."""

    def start(self, settings: Settings, folder: Path) -> None:
        self._folder, self._config = folder / "tensorboard", config_of(settings)
        self._resumed = self._folder.is_dir()
        self._writer: SummaryWriter | None = None

    def _opened(self, first_round: int | None) -> SummaryWriter:
        """The writer, made when the first round to write is known: TensorBoard then forgets that round and all behind it."""
        if self._writer is None:
            purge = first_round if self._resumed else None
            self._writer = SummaryWriter(str(self._folder), purge_step=purge)
            if not self._resumed:
                self._text("config", self._config, 0)
        return self._writer

    def _text(self, name: str, values: object, step: int) -> None:
        shown = json.dumps(values, indent=1, default=str).replace("\n", "\n    ")
        assert self._writer is not None
        self._writer.add_text(name, f"    {shown}", step)

    def round(self, metrics: RoundMetrics) -> None:
        writer = self._opened(metrics.round)
        for name, value in finite(metrics).items():
            writer.add_scalar(name, value, metrics.round)
        writer.flush()

    def finish(self, summary: Summary | None) -> None:
        writer = self._opened(None)
        if summary:
            self._text("summary", finite(summary), summary.rounds)
        writer.close()
