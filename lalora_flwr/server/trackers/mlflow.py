"""``track = "mlflow"``: the store that ``MLFLOW_TRACKING_URI`` names, or ``mlflow.db`` beside the run folders."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from lalora_flwr.server.metrics import RoundMetrics, Summary
from lalora_flwr.server.trackers.tracker import PROJECT, config_of, finite, keep
from lalora_flwr.settings import Settings

ALWAYS = "sites"  # a metric of every round
MOST_PARAMS = 100  # in one call


class Mlflow:
    """One MLflow run for a run of ours; its id lies in ``tracking/mlflow`` of the run's folder.

    It uses MLflow's client and not its global state, which would add the user, the host's file names and the commit.
    """

    def start(self, settings: Settings, folder: Path) -> None:
        for name in ("alembic", "mlflow"):  # they would write over the progress on the console
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.parent / 'mlflow.db'}")
        note, self._last = folder / "tracking" / "mlflow", 0
        if note.is_file():
            self._run = note.read_text(encoding="utf-8").strip()
            self._client.update_run(self._run, status="RUNNING")
            self._last = max((one.step for one in self._client.get_metric_history(self._run, ALWAYS)), default=0)
            return
        self._run = self._client.create_run(self._experiment(), run_name=settings.run_name).info.run_id
        keep(note, self._run)
        params = [Param(name, str(value)) for name, value in config_of(settings).items()]
        for first in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self._run, params=params[first : first + MOST_PARAMS])

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:
                if (found := self._client.get_experiment_by_name(name)) is None:  # else another run was faster
                    raise
        return str(found.experiment_id)

    def round(self, metrics: RoundMetrics) -> None:
        if metrics.round > self._last:  # MLflow would keep a round that it gets twice twice
            self._log(finite(metrics), metrics.round)

    def _log(self, numbers: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in numbers.items()])

    def finish(self, summary: Summary | None) -> None:
        if summary:
            self._log({f"final/{name}": value for name, value in finite(summary).items()}, summary.rounds)
        self._client.set_terminated(self._run, "FINISHED" if summary else "FAILED")
