"""The job in NVFlare's simulator: its FedAvg, its client API, a process for each site.

With fewer processes than sites the simulator starts a new one for every task, imports and all; so this is for few sites.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.app_constant import AppConstants  # noqa: F401  its import order matters to the job's API
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.client.config import ExchangeFormat
from nvflare.fuel.utils.constants import FrameworkType
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import ScriptRunner

from benchmarks.clocks import Marks
from benchmarks.job import JOB, Job, Mark, State, settings_of

CLIENT = Path(__file__).with_name("nvidia_flare_client.py")
LEFT, CLOCKS = "left.json", "clocks.json"


class Averaging(FedAvg):  # type: ignore[misc]
    """FedAvg that starts from the job's adapter, keeps no files, and writes down clocks and the last adapter."""

    def __init__(self, folder: str, root: int) -> None:
        self.folder, self.root = folder, root  # by these NVFlare makes it again in the server's process
        job = Job.of(os.environ[JOB])
        super().__init__(num_clients=job.cohort, num_rounds=job.rounds)
        self._marks = Marks(job.rounds, root)

    def load_model(self) -> FLModel:
        from lalora_flwr.training.learner import ModelStore

        initial = ModelStore().learner(settings_of(Job.of(os.environ[JOB]), "unused")).initial
        return FLModel(params={name: value.numpy() for name, value in initial.items()})

    def save_model(self, model: FLModel) -> None:
        self._marks()
        if self._marks.ended:
            left = {name: value.tolist() for name, value in model.params.items()}
            Path(self.folder, LEFT).write_text(json.dumps(left))
            Path(self.folder, CLOCKS).write_text(json.dumps(self._marks.at))


def run(job: Job, mark: Mark) -> State:
    assert isinstance(mark, Marks)
    os.environ[JOB] = job.text()
    with tempfile.TemporaryDirectory() as folder:
        flare = FedJob(name="job", min_clients=job.cohort)
        flare.to_server(Averaging(folder, os.getpid()))
        flare.to_clients(
            ScriptRunner(
                script=str(CLIENT),
                framework=FrameworkType.NUMPY,
                server_expected_format=ExchangeFormat.NUMPY,
            )
        )
        flare.simulator_run(folder + "/workspace", n_clients=job.sites, threads=job.sites)
        mark.at += [(cpu, wall) for cpu, wall in json.loads(Path(folder, CLOCKS).read_text())]
        return {name: torch.tensor(value) for name, value in json.loads(Path(folder, LEFT).read_text()).items()}
