"""A simulation's cost: CPU-seconds of a round, start, and memory, on the embedded ViT.

    python -m benchmarks.simulation                      100 sites, 10 a round, K = 1 and 10, b = 4, 10 and 40; about 10 minutes
    python -m benchmarks.simulation --sites 10 1000 --steps 1 --batch 10

Made-up images; LA-LoRA with its filter at ε = 3. Each row is a process of its own, run in turns ``--repeats`` times; the
fastest counts.

    bare         a loop by hand: this package's gradients, clip and noise in float32, mean; no Flower, messages, ledger or files
    inline       ``lalora run --engine inline``: sites share passes where that pays
    one by one   the same, each site's passes alone
    opacus       a loop by hand with Opacus: hooks and DPOptimizer, A and B at every step; no Flower either

A round's CPU-seconds are those of the later half of the rounds; ``start`` is wall time up to the end of the first round, without
imports; ``memory`` is the peak of the process.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import processor
from lalora_flwr.data.records import Records
from lalora_flwr.engines.inline import InlineGrid
from lalora_flwr.engines.together import SitesTogether
from lalora_flwr.methods.smoothing import smoothed
from lalora_flwr.models.base import BaseModel
from lalora_flwr.server.run import run_federation
from lalora_flwr.settings import Settings, flatten, settings_from
from lalora_flwr.site.app import make_client_app
from lalora_flwr.site.host import Host
from lalora_flwr.site.records import NodeConfig
from lalora_flwr.training.learner import Learner, LearnerCache, ModelStore

VARIANTS = ("bare", "inline", "one by one", "opacus")
COHORT = 10
Mark = Callable[[], None]


def made_up(count: int, seed: int) -> Records:
    generator = torch.Generator().manual_seed(seed)
    return Records(torch.rand(count, 1, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator))


def settings_of(sites: int, steps: int, batch: int, rounds: int, folder: str) -> Settings:
    """A run over so many sites, ten of them a round."""
    values: dict[str, Any] = {
        "num-supernodes": sites,
        "fraction-train": COHORT / sites,
        "num-rounds": rounds,
        "evaluate-every": 100_000,
        "train.local-steps": steps,
        "train.batch-size": batch,
        "train.lr": 0.1,
        "output-dir": folder,
        "run-name": "run",
    }
    return settings_from(values)


def ours(settings: Settings, mark: Mark, *, alone: bool) -> None:
    models, own = ModelStore(), settings.train.batch_size + 2
    records = made_up(settings.num_supernodes * own, 0)

    def read(settings: Settings, node_config: NodeConfig, base: BaseModel) -> Records:
        first = int(node_config["partition-id"]) * own
        return records.take(torch.arange(first, first + own))

    host = Host(simulated=True, learners=LearnerCache(models), records=read)
    together = None if alone else SitesTogether(models, records=read)
    grid = InlineGrid(make_client_app(lambda: host), settings.num_supernodes, dict(flatten(settings)), together)
    run_federation(settings, grid, lambda line: mark(), models=models)


def bare(settings: Settings, mark: Mark) -> None:
    """The floor: what any engine has to compute, and no more."""
    learner = ModelStore().learner(settings)
    data, train, C = made_up(settings.num_supernodes * (settings.train.batch_size + 2), 0), settings.train, 2.0
    adapter, layout = learner.adapter, learner.adapter.layout
    state, generator = adapter.state(), torch.Generator().manual_seed(0)
    own = train.batch_size + 2
    for _ in range(settings.num_rounds):
        ends = []
        for site in torch.randperm(settings.num_supernodes, generator=generator)[:COHORT].tolist():
            adapter.load(state)
            for step in range(train.local_steps):
                active = adapter.activate(layout.of("lora_A" if step % 2 else "lora_B"))
                drawn = site * own + torch.nonzero(torch.rand(own, generator=generator) < train.batch_size / own).flatten()
                released = _clipped_and_noised(learner, data.inputs[drawn], data.labels[drawn], C, generator)
                with torch.no_grad():
                    for name, parameter in active.items():
                        axis = layout[name].feature_axis or 0
                        parameter.sub_(train.lr / train.batch_size * smoothed(released[name], axis, 5))
            ends.append(adapter.state())
        state = {name: torch.stack([end[name] for end in ends]).mean(0) for name in state}
        mark()


def _clipped_and_noised(learner: Learner, inputs: Any, labels: Tensor, C: float, generator: torch.Generator) -> dict[str, Tensor]:
    if not len(labels):
        return {
            n: C * torch.randn(p.shape, generator=generator) for n, p in learner.adapter.parameters.items() if p.requires_grad
        }
    gradients, _ = learner.gradients(inputs, labels)
    norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()
    factors = (C / norms).clamp(max=1.0)
    sums = {name: torch.tensordot(factors, g, 1) for name, g in gradients.items()}
    return {name: value + C * torch.randn(value.shape, generator=generator) for name, value in sums.items()}


def with_opacus(settings: Settings, mark: Mark) -> None:
    """What a textbook does on each client, without Flower around it."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    learner = ModelStore().learner(settings)
    stock = learner.adapter.model
    for module in stock.modules():
        if type(module).__name__ in ("FusedLoraLinear", "PerSampleLinear"):
            module.__class__ = type(module).__mro__[1] if type(module).__name__ == "FusedLoraLinear" else torch.nn.Linear
    learner.adapter.activate(learner.adapter.trainable)
    model = GradSampleModule(stock)
    data, train = made_up(settings.num_supernodes * (settings.train.batch_size + 2), 0), settings.train
    state, generator, own = learner.adapter.state(), torch.Generator().manual_seed(0), train.batch_size + 2
    for _ in range(settings.num_rounds):
        ends = []
        for site in torch.randperm(settings.num_supernodes, generator=generator)[:COHORT].tolist():
            learner.adapter.load(state)
            parameters = list(learner.adapter.parameters.values())
            optimizer = DPOptimizer(
                torch.optim.SGD(parameters, lr=train.lr),
                noise_multiplier=1.0,
                max_grad_norm=2.0,
                expected_batch_size=train.batch_size,
            )
            for _ in range(train.local_steps):
                drawn = site * own + torch.nonzero(torch.rand(own, generator=generator) < train.batch_size / own).flatten()
                if len(drawn):
                    optimizer.zero_grad()
                    torch.nn.functional.cross_entropy(model(data.inputs[drawn]), data.labels[drawn]).backward()
                    optimizer.step()
            ends.append(learner.adapter.state())
        state = {name: torch.stack([end[name] for end in ends]).mean(0) for name in state}
        mark()


def one(variant: str, sites: int, steps: int, batch: int, rounds: int) -> dict[str, float]:
    """A process's own numbers."""
    torch.set_num_threads(1)
    marks: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(sites, steps, batch, rounds, folder)
        begun = time.perf_counter()

        def mark() -> None:
            marks.append((time.process_time(), time.perf_counter()))

        if variant == "bare":
            bare(settings, mark)
        elif variant == "opacus":
            with_opacus(settings, mark)
        else:
            ours(settings, mark, alone=variant == "one by one")
    half = len(marks) // 2
    cpu = (marks[-1][0] - marks[half - 1][0]) / (len(marks) - half)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"cpu": cpu, "start": marks[0][1] - begun, "memory": memory}


def measured(variant: str, *numbers: int) -> dict[str, float]:
    """The numbers of a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.simulation", "--one", variant, *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{variant} {numbers}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[100])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 10, 40])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(one(asked.one[0], *map(int, asked.one[1:]))))
        return
    print(f"{processor()}, torch {torch.__version__}, one thread; {COHORT} sites a round\n")
    print(
        "| sites | K | b | | CPU-s a round | of bare | start (s) | memory (MB) |\n|---|---|---|---|---|---|---|---|", flush=True
    )
    for sites in asked.sites:
        for steps in asked.steps:
            for batch in asked.batch:
                rounds = 60 if steps == 1 else 12
                best: dict[str, dict[str, float]] = {}
                for _ in range(asked.repeats):
                    for variant in asked.variants:
                        found = measured(variant, sites, steps, batch, rounds)
                        kept = best.setdefault(variant, found)
                        best[variant] = {name: min(kept[name], found[name]) for name in found}
                floor = best.get("bare", {}).get("cpu", math.nan)
                for variant, found in best.items():
                    numbers = f"{found['cpu']:.3f} | {found['cpu'] / floor:.2f} | {found['start']:.1f} | {found['memory']:.0f}"
                    print(f"| {sites} | {steps} | {batch} | {variant} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
