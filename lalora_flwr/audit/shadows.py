"""Whole runs over known halves of the records, and what their finished adapters say of every record."""

from __future__ import annotations

import dataclasses
import signal
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lalora_flwr.audit.attacks import Coins
from lalora_flwr.audit.bounds import Scores
from lalora_flwr.audit.planted import GRADIENT, UNREADABLE, PlantedLearners, Pool, pool_of, projections
from lalora_flwr.data.data_set import data_set
from lalora_flwr.data.inputs import to_device
from lalora_flwr.data.records import RecordSet, Subset
from lalora_flwr.diagnose.opened import opened
from lalora_flwr.engines.inline import InlineGrid, logs_in
from lalora_flwr.ground.errors import ConfigError, RunFailed
from lalora_flwr.ground.processors import processors
from lalora_flwr.ground.seeds import derive_seed
from lalora_flwr.models.text import CausalLanguageModel
from lalora_flwr.privacy.randomness import RandomSource, SeededRandom
from lalora_flwr.server.folder import LOG
from lalora_flwr.server.run import run_federation
from lalora_flwr.settings import Settings, Value, flatten, settings_from
from lalora_flwr.site.app import make_client_app
from lalora_flwr.site.host import Host
from lalora_flwr.tasks.single_label import SingleLabel
from lalora_flwr.training.evaluate import BATCH
from lalora_flwr.training.learner import Learner, ModelStore

Told = Callable[[int], None]  # how many runs are done
A_TIME = 2  # runs of a process with one model, so that there is news now and then


@dataclass(frozen=True)
class Runs:
    """Runs over halves of the records.

    Attributes:
        inside: whether each record was in each run, by a fair coin, (runs, n).
        kinds: what each record is, as `lalora_flwr.audit.planted` numbers them, (n,).
        confidences: of each record under each run's adapter, (runs, n); of a gradient canary how far the adapter went its way.
            Without canaries those of the run's test records follow.
    """

    inside: Coins
    kinds: NDArray[np.int64]
    confidences: Scores


def coins(settings: Settings, pool: Pool, number: int) -> Coins:
    """Which records are inside run ``number``, (n,); a site whose coins are all against it keeps its first record."""
    random = np.random.default_rng(derive_seed(settings.seed, "coins", number))
    found = [random.random(len(site)) < 0.5 for site in pool.sites]
    for own in found:
        own[:1] |= not own.any()
    return np.concatenate(found)


@torch.inference_mode()
def confidences(learner: Learner, records: RecordSet) -> Scores:
    """How sure the model, with the adapter now in it, is of each record's label, (n,).

    With one class per record it is the logit of the label's probability, log p - log(1 - p), in which the confidences of many
    runs are nearly Gaussian (arXiv 2112.03570); elsewhere it is the loss with its sign changed.

    Raises:
        ConfigError: a record cannot be read.
    """
    learner.adapter.model.eval()
    base, device = learner.base, learner.adapter.device
    by_class = isinstance(base.problem, SingleLabel) and not isinstance(base, CausalLanguageModel)
    found = np.zeros(len(records))
    for part in records.parts(torch.arange(len(records)), BATCH):
        inputs, labels = records.batch(part)
        if len(labels) != len(part):
            raise ConfigError(UNREADABLE)
        inputs, labels = to_device(inputs, device), labels.to(device)
        if by_class:
            logits = base.logits(learner.adapter.model, inputs).double()
            own = labels.clamp(max=logits.shape[1] - 1)[:, None]
            values = logits.gather(1, own)[:, 0] - logits.scatter(1, own, -torch.inf).logsumexp(1)
        else:
            values = -learner.adapter.losses(base, inputs, labels).double()
        found[part.numpy()] = values.cpu().numpy()
    return np.nan_to_num(found, nan=0.0, posinf=100.0, neginf=-100.0)


def of_pool(learner: Learner, pool: Pool) -> Scores:
    """`confidences` of all records of the sites, one after the other, or of gradient canaries their `projections`."""
    found = np.concatenate([confidences(learner, site) for site in pool.sites])
    if pool.gradients:
        found[pool.kinds == GRADIENT] = projections(learner, pool)
    return found


def run_over(settings: Settings, models: ModelStore, pool: Pool, inside: Coins, number: int) -> dict[str, Tensor]:
    """The adapter of one run of the settings over some of the records.

    All code is the run's own; the records are handed in, and the draws follow from the run's seed and ``number``.

    Raises:
        RunFailed: the run stopped.
    """
    ends = np.cumsum([len(site) for site in pool.sites])
    own = [
        Subset(site, torch.from_numpy(np.flatnonzero(which)))
        for site, which in zip(pool.sites, np.split(inside, ends[:-1]), strict=True)
    ]

    def seeded(seed: int, site: int, server_round: int, attempt: int) -> RandomSource:
        return SeededRandom(derive_seed(seed, "membership", number), site, server_round, attempt)

    learners = PlantedLearners(models, pool, settings.privacy.clip_norm)
    host = Host(
        simulated=True,
        learners=learners,
        records=lambda settings, node_config, base: own[int(node_config["partition-id"])],
        seeded=seeded,
    )
    with tempfile.TemporaryDirectory() as folder, logs_in(Path(folder) / "membership" / LOG):
        here = dataclasses.replace(settings, output_dir=folder, run_name="membership", resume=False)
        here = dataclasses.replace(here, evaluate_every=settings.num_rounds, evaluate_sites=False)
        grid = InlineGrid(make_client_app(lambda: host), here.num_supernodes, dict(flatten(here)))
        path = run_federation(here, grid, models=models, records=[len(records) for records in own])
        return opened(path).adapter


def some_runs(
    values: dict[str, Value], numbers: Sequence[int], canaries: bool, told: Told = lambda done: None
) -> dict[int, tuple[Coins, Scores]]:
    """Runs by their numbers, in this process."""
    settings, models = settings_from(values), ModelStore()
    learner = models.learner(settings)
    pool = pool_of(settings, learner, plant=canaries)
    found = {}
    for number in numbers:
        inside = coins(settings, pool, number)
        learner.adapter.load(run_over(settings, models, pool, inside, number))
        scores = of_pool(learner, pool)
        if not canaries:
            scores = np.concatenate([scores, confidences(learner, data_set(settings).public(learner.base.encode))])
        found[number] = inside, scores
        told(len(found))
    return found


def all_runs(settings: Settings, count: int, *, canaries: bool, workers: int = 0, told: Told = lambda done: None) -> Runs:
    """``count`` runs over halves of the records, each by coins of its own.

    Args:
        settings: of the runs.
        count: how many.
        canaries: put some among the records.
        workers: processes; 0: as many as the processors carry; 1: this one alone.
        told: hears how many runs are done.

    Raises:
        RunFailed: a run stopped, or a process died.
    """
    values = dict(flatten(settings))
    workers = min(count, workers or max(1, processors() // settings.train.num_threads))
    pool = pool_of(settings, ModelStore().learner(settings), plant=canaries)
    made = some_runs(values, range(count), canaries, told) if workers == 1 else _elsewhere(values, count, canaries, workers, told)
    rows = [made[number] for number in range(count)]
    return Runs(np.stack([inside for inside, _ in rows]), pool.kinds, np.stack([scores for _, scores in rows]))


def _elsewhere(values: dict[str, Value], count: int, canaries: bool, workers: int, told: Told) -> dict[int, tuple[Coins, Scores]]:
    """The runs, a few at a time, in processes of their own."""
    found: dict[int, tuple[Coins, Scores]] = {}
    before = set(active_children())
    with ProcessPoolExecutor(workers, get_context("spawn"), _left_to_the_parent) as processes:
        try:
            few = [range(count)[first : first + A_TIME] for first in range(0, count, A_TIME)]
            tasks = [processes.submit(some_runs, values, numbers, canaries) for numbers in few]
            for task in as_completed(tasks):
                found |= task.result()
                told(len(found))
        except BrokenProcessPool:
            raise RunFailed("a process of the attack died, perhaps for lack of memory; take fewer --workers") from None
        except BaseException:
            processes.shutdown(wait=False, cancel_futures=True)
            for child in set(active_children()) - before:
                child.terminate()
            raise
    return found


def _left_to_the_parent() -> None:
    """Ctrl-C ends the process that waits, which ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
