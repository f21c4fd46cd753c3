"""The job without a framework, and with ours: see `benchmarks.simulation` for what each stands for."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.job import ALPHA, JOB, RATE, Job, LocalTraining, Mark, State, cohort_of, made_up, mean, settings_of
from lalora_flwr.data.inputs import rows
from lalora_flwr.data.records import Records
from lalora_flwr.engines.inline import InlineGrid
from lalora_flwr.engines.simulation import run_simulation
from lalora_flwr.engines.together import SitesTogether
from lalora_flwr.models.base import BaseModel
from lalora_flwr.models.embedded import DEFAULT_TARGETS, build_vit_digits
from lalora_flwr.models.targets import TRANSFORMERS_TARGETS
from lalora_flwr.server.folder import read_checkpoint
from lalora_flwr.server.run import run_federation
from lalora_flwr.settings import Settings, flatten
from lalora_flwr.site.app import make_client_app
from lalora_flwr.site.host import Host
from lalora_flwr.site.records import NodeConfig, ReadRecords
from lalora_flwr.training.learner import LearnerCache, ModelStore


def bare(job: Job, mark: Mark) -> State:
    """The floor: what any engine has to compute, and no more."""
    training = LocalTraining(job)
    state = training.adapter.state()
    for server_round in range(job.rounds):
        ends = []
        for site in cohort_of(job, server_round):
            training.adapter.load(state)
            training.train(server_round, site)
            ends.append(training.adapter.state())
        state = mean(ends)
        mark()
    return state


def bare_spread(job: Job, mark: Mark) -> State:
    """The floor of engines with a worker a processor: the same loop, a round's sites dealt out to as many processes."""
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in range(os.cpu_count() or 1)]
    workers = [spawn.Process(target=_bare_worker, args=(job, theirs), daemon=True) for _, theirs in pipes]
    for worker in workers:
        worker.start()
    state = LocalTraining(job).adapter.state()
    for server_round in range(job.rounds):
        cohort = list(cohort_of(job, server_round))
        for k, (ours, _) in enumerate(pipes):
            ours.send((server_round, cohort[k :: len(pipes)], {name: value.numpy() for name, value in state.items()}))
        ends: dict[int, State] = {}
        for ours, _ in pipes:
            ends |= {site: {name: torch.from_numpy(value) for name, value in end.items()} for site, end in ours.recv().items()}
        state = mean([ends[site] for site in cohort])
        mark()
    for worker in workers:
        worker.terminate()
    return state


def _bare_worker(job: Job, pipe: Connection) -> None:
    torch.set_num_threads(1)
    training = LocalTraining(job)
    while True:
        server_round, sites, arrays = pipe.recv()
        state = {name: torch.from_numpy(value) for name, value in arrays.items()}
        ends = {}
        for site in sites:
            training.adapter.load(state)
            training.train(server_round, site)
            ends[site] = {name: value.numpy() for name, value in training.adapter.state().items()}
        pipe.send(ends)


def opacus(job: Job, mark: Mark) -> State:
    """A textbook's client with Opacus' hooks and DPOptimizer, without Flower around it."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    stock, initial = stock_model_of(stock_base(job), job), ModelStore().learner(settings_of(job, "unused")).initial
    model, data = GradSampleModule(stock), made_up(job)
    parameters = {own_name(name): p for name, p in stock.named_parameters() if p.requires_grad}
    state = {name: initial[name] for name in parameters}
    for server_round in range(job.rounds):
        ends = []
        for site in cohort_of(job, server_round):
            generator = torch.Generator().manual_seed(server_round * 1_000_003 + site)
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(state[name])
            optimizer = DPOptimizer(
                torch.optim.SGD(parameters.values(), lr=RATE),
                noise_multiplier=job.noise,
                max_grad_norm=job.clip,
                expected_batch_size=job.batch,
            )
            for _ in range(job.steps):
                drawn = site * job.own + torch.nonzero(torch.rand(job.own, generator=generator) < job.batch / job.own).flatten()
                if len(drawn):
                    optimizer.zero_grad()
                    loss_of(model, rows(data.inputs, drawn), data.labels[drawn]).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
            ends.append({name: p.detach().clone() for name, p in parameters.items()})
        state = mean(ends)
        mark()
    return state


def stock_model_of(base: torch.nn.Module, job: Job) -> torch.nn.Module:
    """A stock PEFT model as a user makes it, in which only LoRA's factors train."""
    from peft import LoraConfig, get_peft_model

    targets = list(DEFAULT_TARGETS if job.model == "vit" else TRANSFORMERS_TARGETS["bert"])
    return get_peft_model(base, LoraConfig(r=job.rank, lora_alpha=int(ALPHA), target_modules=targets)).train()


def stock_base(job: Job) -> torch.nn.Module:
    """The frozen model without this package, as README.md loads it."""
    if job.model == "minilm":
        from transformers import BertForSequenceClassification

        quiet: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertForSequenceClassification.from_pretrained(f"{job.folder}/minilm", **quiet)
    return build_vit_digits()


def own_name(name: str) -> str:
    """A stock PEFT parameter's name as this package writes it."""
    return name.removeprefix("_module.").replace(".default", "")


def loss_of(model: torch.nn.Module, inputs: object, labels: torch.Tensor) -> torch.Tensor:
    output = model(**inputs).logits if isinstance(inputs, dict) else model(inputs)
    return torch.nn.functional.cross_entropy(output, labels)


def inline(job: Job, mark: Mark) -> State:
    """Our engine, sites in shared passes where that pays."""
    return _ours(job, mark, alone=False)


def one_by_one(job: Job, mark: Mark) -> State:
    """Our engine, each site's passes alone."""
    return _ours(job, mark, alone=True)


def records_of(job: Job) -> ReadRecords:
    """Reads a site's made-up records."""
    data = made_up(job)

    def read(settings: Settings, node_config: NodeConfig, base: BaseModel) -> Records:
        return data.take(job.site_records(int(node_config["partition-id"])))

    return read


def _ours(job: Job, mark: Mark, *, alone: bool) -> State:
    with tempfile.TemporaryDirectory() as folder:
        settings, models, read = settings_of(job, folder), ModelStore(), records_of(job)
        host = Host(simulated=True, learners=LearnerCache(models), records=read)
        together = None if alone else SitesTogether(host)
        grid = InlineGrid(make_client_app(lambda: host), job.sites, dict(flatten(settings)), together)
        run_federation(settings, grid, lambda line: mark(), models=models)
        return _left(folder)


def ray(job: Job, mark: Mark) -> State:
    """Our engine on Flower's simulation, one worker a processor."""
    os.environ[JOB] = job.text()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(job, folder)
        run_simulation(settings, lambda line: mark(), client_app="benchmarks.made_up_app:app")
        return _left(folder)


def _left(folder: str) -> State:
    checkpoint = read_checkpoint(Path(folder) / "run")
    return dict(checkpoint.adapter) if checkpoint else {}
