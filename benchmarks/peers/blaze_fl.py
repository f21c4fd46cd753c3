"""The job in BlazeFL: its thread pool of clients and its averaging, with as many threads as cost the fewest CPU-seconds: one.

A thread's model is its own. On a Python with a global lock more threads only wait for each other; the frozen weights are shared.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from blazefl.contrib.fedavg import FedAvgBaseServerHandler
from blazefl.core import ThreadPoolClientTrainer
from torch import Tensor

from benchmarks.job import Job, LocalTraining, Mark, State, cohort_of


@dataclass(frozen=True)
class _Down:
    values: Tensor
    server_round: int


class _Handler:
    """The server: the job's sites, BlazeFL's own averaging of serialised parameters."""

    def __init__(self, job: Job, values: Tensor) -> None:
        self._job, self.values, self.round = job, values, 0

    def downlink_package(self) -> _Down:
        return _Down(self.values, self.round)

    def sample_clients(self) -> list[int]:
        return cohort_of(self._job, self.round)

    def is_stopped(self) -> bool:
        return self.round >= self._job.rounds

    def global_update(self, buffer: list[Tensor]) -> None:
        self.values = FedAvgBaseServerHandler.aggregate(buffer, [1] * len(buffer))
        self.round += 1


class _Trainer(ThreadPoolClientTrainer):  # type: ignore[misc]
    """The clients: each thread trains a model of its own."""

    def __init__(self, job: Job, training: LocalTraining, threads: int) -> None:
        self.num_parallels, self.device, self.device_count = threads, "cpu", 0
        self.cache: list[Tensor] = []
        self.stop_event = threading.Event()
        self._job, self._free = job, [training, *(LocalTraining(job) for _ in range(threads - 1))]

    def worker(self, cid: int, device: str, payload: _Down, stop_event: threading.Event) -> Tensor:
        training = self._free.pop()
        load(training, payload.values)
        training.train(payload.server_round, cid)
        left = serialized(training)
        self._free.append(training)
        return left

    def uplink_package(self) -> list[Tensor]:
        package, self.cache = self.cache, []
        return package


def serialized(training: LocalTraining) -> Tensor:
    """The adapter as one vector, as BlazeFL's `serialize_model` makes of a whole module."""
    return torch.cat([p.detach().reshape(-1) for p in training.adapter.parameters.values()])


@torch.no_grad()
def load(training: LocalTraining, values: Tensor) -> None:
    parts = torch.split(values, [p.numel() for p in training.adapter.parameters.values()])
    for parameter, part in zip(training.adapter.parameters.values(), parts, strict=True):
        parameter.copy_(part.view_as(parameter))


def run(job: Job, mark: Mark, threads: int = 1) -> State:
    training = LocalTraining(job)
    handler, trainer = _Handler(job, serialized(training)), _Trainer(job, training, threads)
    while not handler.is_stopped():
        trainer.local_process(handler.downlink_package(), handler.sample_clients())
        handler.global_update(trainer.uplink_package())
        mark()
    load(training, handler.values)
    return training.adapter.state()
