"""The job in Apple's pfl-research (``pfl``): its cohorts, model state, aggregation and central optimizer, one process."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel

from benchmarks.job import Job, LocalTraining, Mark, State, cohort_of


class _Averaging(FederatedAveraging):  # type: ignore[misc]
    """Federated averaging whose local training is the job's steps, in place of `do_sgd`."""

    def __init__(self, training: LocalTraining) -> None:
        super().__init__()
        self._training = training

    def train_one_user(self, initial_model_state, model, user_dataset, central_context):  # type: ignore[no-untyped-def]
        self._training.train(central_context.current_central_iteration, int(user_dataset.user_id))
        return model.get_model_difference(initial_model_state), Metrics()


class _Ended(TrainingProcessCallback):  # type: ignore[misc]
    def __init__(self, mark: Mark) -> None:
        self._mark = mark

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):  # type: ignore[no-untyped-def]
        self._mark()
        return False, Metrics()


def run(job: Job, mark: Mark) -> State:
    np.random.seed(0)
    training = LocalTraining(job)
    sites = (site for server_round in range(job.rounds) for site in cohort_of(job, server_round))
    data = training.data

    def of_site(site: int) -> Dataset:
        return Dataset(raw_data=[data.labels[job.site_records(site)]], user_id=str(site))

    users = FederatedDataset(of_site, lambda: next(sites))
    module: Any = training.adapter.model
    training.adapter.activate(training.adapter.trainable)  # pfl's parameters are those that require a gradient at its start
    module.loss = None  # its constructor asks for both; the job's steps have a loss of their own, and nothing is evaluated
    module.metrics = lambda labels: {"nothing": Weighted(0, 1)}  # pfl asks once, in the first round
    optimizer = torch.optim.SGD(training.adapter.parameters.values(), lr=1.0)
    model = PyTorchModel(module, torch.optim.SGD, optimizer)
    _Averaging(training).run(
        NNAlgorithmParams(
            central_num_iterations=job.rounds,
            evaluation_frequency=10**9,
            train_cohort_size=job.cohort,
            val_cohort_size=None,
        ),
        SimulatedBackend(users, users),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=math.nan, local_batch_size=None),
        callbacks=[_Ended(mark)],
        send_metrics_to_platform=False,
    )
    return training.adapter.state()
