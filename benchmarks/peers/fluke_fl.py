"""The job in fluke: its server, clients, channel and aggregation, one process.

What travels is a module of the adapter's tensors alone: fluke copies whatever module a server sends, and the frozen weights need
no copy for each client.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fluke import FlukeENV
from fluke.algorithms import CentralizedFL
from fluke.client import Client
from fluke.data import FastDataLoader
from fluke.server import Server
from fluke.utils import FederationObserver
from torch import nn

from benchmarks.job import Job, LocalTraining, Mark, State, cohort_of


class _Travelling(nn.Module):
    """The adapter's tensors under names without dots."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.tensors = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(value.clone()) for name, value in state.items()})

    def state(self) -> State:
        return {name.replace("/", "."): value.detach() for name, value in self.tensors.items()}


class _Client(Client):  # type: ignore[misc]
    """Trains the one model of the process."""

    training: LocalTraining

    def fit(self, override_local_epochs: int = 0) -> float:
        adapter = self.training.adapter
        adapter.load(self.model.state())
        self.training.train(_Server.rounds_done, self.index)
        with torch.no_grad():
            for name, parameter in self.model.tensors.items():
                parameter.copy_(adapter.parameters[name.replace("/", ".")])
        return 0.0


class _Server(Server):  # type: ignore[misc]
    """Picks the job's sites."""

    job: Job
    rounds_done = 0

    def get_eligible_clients(self, eligible_perc: float) -> Sequence[Client]:
        return [self.clients[site] for site in cohort_of(self.job, _Server.rounds_done)]


class _Ended(FederationObserver):  # type: ignore[misc]
    def __init__(self, mark: Mark) -> None:
        self._mark = mark

    def end_round(self, round: int) -> None:
        _Server.rounds_done = round
        self._mark()


def run(job: Job, mark: Mark) -> State:
    env = FlukeENV()
    env.set_seed(0)
    env.set_eval_cfg(locals=False, server=False, pre_fit=False, post_fit=False)
    training = LocalTraining(job)
    _Client.training, _Server.job = training, job

    def client(site: int) -> Client:
        own = job.site_records(site)
        loader = FastDataLoader(own, training.data.labels[own], num_labels=10, batch_size=job.batch)
        nothing: Any = None  # neither tests, optimizer nor loss: `fit` is the job's
        return _Client(site, loader, nothing, nothing, nothing, local_epochs=1, persistency=False)

    clients = [client(site) for site in range(job.sites)]
    model = _Travelling(training.adapter.state())
    algorithm = CentralizedFL(job.sites, None, {}, clients=clients, server=_Server(model, None, clients))
    algorithm.set_callbacks(_Ended(mark))
    algorithm.run(job.rounds, job.cohort / job.sites, finalize=False)
    return model.state()
