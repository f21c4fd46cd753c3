"""``track = "wandb"``: Weights & Biases, online or with ``WANDB_MODE=offline``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import wandb

from lalora_flwr.server.metrics import RoundMetrics, Summary
from lalora_flwr.server.trackers.tracker import PROJECT, config_of, finite, kept_id
from lalora_flwr.settings import Settings

SECONDS = 60.0  # to log in, to start, and to send the rest at the end
QUIET: dict[str, Any] = {  # by default it sends console, code, packages, host and load of the machine too
    "console": "off",
    "silent": True,
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "x_save_requirements": False,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "login_timeout": SECONDS,
    "init_timeout": SECONDS,
    "finish_timeout": SECONDS,
}


class WeightsAndBiases:
    """One W&B run for a run of ours; its id lies in ``tracking/wandb`` of the run's folder."""

    def start(self, settings: Settings, folder: Path) -> None:
        options = wandb.Settings(**QUIET)
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):  # nobody is there to answer a question
            raise RuntimeError("not logged in to W&B: `wandb login`, or WANDB_MODE=offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=kept_id(folder / "tracking" / "wandb"),
            name=settings.run_name,
            dir=str(folder),
            config=config_of(settings),
            resume="allow",
            reinit="create_new",  # another run of the same process goes on
            settings=options,
        )
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")

    def round(self, metrics: RoundMetrics) -> None:
        self._run.log({**finite(metrics), "round": metrics.round}, step=metrics.round)  # an earlier step is not taken again

    def finish(self, summary: Summary | None) -> None:
        if summary:
            self._run.summary.update(finite(summary))
        self._run.finish(exit_code=0 if summary else 1)
