"""The adapters of a finished run, each a folder with a model card."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lalora_flwr.server.best import Best
from lalora_flwr.server.card import model_card
from lalora_flwr.server.folder import RunFolder
from lalora_flwr.server.metrics import Summary
from lalora_flwr.settings import Settings
from lalora_flwr.training.learner import Learner


def save_adapters(
    folder: RunFolder, settings: Settings, learner: Learner, summary: Summary, best: Best, average: Mapping[str, Tensor]
) -> None:
    """Write ``adapter/``, and ``best/`` where an earlier round was better.

    Args:
        folder, settings, summary: of the run.
        learner: holds the last round's adapter.
        best: of the rounds.
        average: of the rounds' adapters, which takes the place of the last; empty: there is none.
    """
    base, adapter = learner.base, learner.adapter
    last = average or adapter.state()
    if summary.best_round:
        adapter.load(best.adapter())
        folder.save_adapter(adapter.save, model_card(summary, settings, base, adapter, best=True), "best")
    adapter.load(last)
    folder.save_adapter(adapter.save, model_card(summary, settings, base, adapter))
