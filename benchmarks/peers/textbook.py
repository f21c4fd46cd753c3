"""The job as users of Flower and Opacus write it: a NumPyClient, a PrivacyEngine on each client, FedAvg, Flower on Ray.

Both factors train at every step, since alternating them under Opacus' hooks does not work. `run` makes model and privacy engine
for every message, as Flower's examples do. `run_kept` keeps the model in the worker and only moves LoRA's factors, which is as
fast as this gets without leaving the two libraries.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import Any

import numpy as np
import torch
from flwr.app import Context
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation
from opacus import PrivacyEngine
from torch.utils.data import DataLoader, Dataset

from benchmarks.job import RATE, Job, Mark, State, made_up, settings_of
from benchmarks.loops import loss_of, own_name, stock_base, stock_model_of
from lalora_flwr.data.inputs import rows
from lalora_flwr.data.records import Records
from lalora_flwr.training.learner import ModelStore


class _Site(Dataset[Any]):
    """A site's records, one by one."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Any:
        return rows(self._records.inputs, torch.tensor(index)), self._records.labels[index]


def _factors(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """LoRA's tensors by this package's names, sorted."""
    return dict(sorted((own_name(name), p) for name, p in model.named_parameters() if "lora_" in name))


class _Client(NumPyClient):
    def __init__(self, job: Job, records: Records, model: torch.nn.Module) -> None:
        self._job, self._records, self._model = job, records, model

    def fit(self, parameters: Any, config: Any) -> Any:
        job, factors = self._job, _factors(self._model)
        with torch.no_grad():
            for parameter, value in zip(factors.values(), parameters, strict=True):
                parameter.copy_(torch.from_numpy(value))
        loader = DataLoader(_Site(self._records), batch_size=job.batch)
        optimizer = torch.optim.SGD(factors.values(), lr=RATE)
        engine = PrivacyEngine(accountant="rdp")
        model, optimizer, private = engine.make_private(
            module=self._model, optimizer=optimizer, data_loader=loader, noise_multiplier=job.noise, max_grad_norm=job.clip
        )
        done = 0
        while done < job.steps:
            for inputs, labels in private:
                optimizer.zero_grad()
                if len(labels):
                    loss_of(model, inputs, labels).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                done += 1
                if done == job.steps:
                    break
        left = [p.detach().numpy().copy() for p in factors.values()]
        self._model = model.to_standard_module()
        return left, len(self._records), {}


@cache
def _records(text: str) -> Records:
    return made_up(Job.of(text))


@cache
def _kept(text: str) -> torch.nn.Module:
    return stock_model_of(stock_base(Job.of(text)), Job.of(text))


def _client_app(text: str, keep: bool) -> ClientApp:
    def client_fn(context: Context) -> Any:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        job = Job.of(text)
        model = _kept(text) if keep else stock_model_of(stock_base(job), job)
        own = _records(text).take(job.site_records(int(context.node_config["partition-id"])))
        return _Client(job, own, model).to_client()

    return ClientApp(client_fn=client_fn)


class _Averaging(FedAvg):
    """FedAvg that keeps the last adapter and says when a round ends."""

    def __init__(self, mark: Mark, job: Job, initial: list[np.ndarray]) -> None:
        super().__init__(
            fraction_fit=job.cohort / job.sites,
            fraction_evaluate=0.0,
            min_fit_clients=job.cohort,
            min_available_clients=job.sites,
            initial_parameters=ndarrays_to_parameters(initial),
        )
        self._mark, self.last = mark, initial

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        if failures:
            raise RuntimeError(f"a client failed: {failures[0]}")
        merged, metrics = super().aggregate_fit(server_round, results, failures)
        assert isinstance(merged, Parameters)
        self.last = parameters_to_ndarrays(merged)
        self._mark()
        return merged, metrics


def run(job: Job, mark: Mark) -> State:
    return _run(job, mark, keep=False)


def run_kept(job: Job, mark: Mark) -> State:
    return _run(job, mark, keep=True)


def _run(job: Job, mark: Mark, *, keep: bool) -> State:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    initial = ModelStore().learner(settings_of(job, "unused")).initial
    strategy = _Averaging(mark, job, [initial[name].numpy() for name in sorted(initial)])

    def server_fn(context: Context) -> ServerAppComponents:
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=job.rounds))

    run_simulation(
        ServerApp(server_fn=server_fn),
        _client_app(job.text(), keep),
        num_supernodes=job.sites,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    return {name: torch.from_numpy(value) for name, value in zip(sorted(initial), strategy.last, strict=True)}
