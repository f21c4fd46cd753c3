"""Does a low-pass filter along the features keep more of a gradient than of the noise?

    python -m benchmarks.filter_gain [--config FILE] [-c KEY=VALUE] [--steps N] [--records N]

Trains the adapter without privacy for some steps, so that neither factor is zero, then takes the clipped gradients of some
records and prints for each factor which share of the power of their sum the filter keeps. Of white noise `gauss5` keeps
70/256 = 0.273. A signal-to-noise ratio that rises by the factor g means g times the noise variance for free; g = 1 means
that the filter only makes the step smaller. The permuted control shows what g is without any order of the features.
The numbers are exact statistics of records: this is for public data.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from lalora_flwr.adapter.slots import LORA_A, LORA_B, Layout
from lalora_flwr.cli.options import resolve
from lalora_flwr.data.records import RecordSet
from lalora_flwr.methods.filters import Around, filter_of
from lalora_flwr.privacy.clip import clip
from lalora_flwr.settings import Settings
from lalora_flwr.site.records import RecordStore
from lalora_flwr.training.learner import Learner, ModelStore

WHITE = 70 / 256
BATCH = 64


def clipped_sum(settings: Settings, learner: Learner, records: RecordSet, rows: Tensor) -> dict[str, Tensor]:
    """Sum over the rows of the records' clipped gradients of A and B together, without noise."""
    adapter = learner.adapter
    adapter.model.train()
    adapter.activate(adapter.layout.of(LORA_A, LORA_B))
    total: dict[str, Tensor] = {}
    for part in records.parts(rows, BATCH):
        inputs, labels = records.batch(part)
        gradients = learner.gradients(inputs, labels)[0]
        sums, _ = clip(gradients, settings.privacy.clip_norm)
        total = {name: total[name] + value if total else value for name, value in sums.items()}
    return total


def warm_up(settings: Settings, learner: Learner, records: RecordSet, steps: int) -> None:
    """Plain clipped SGD on A and B."""
    generator = torch.Generator().manual_seed(0)
    parameters = learner.adapter.parameters
    for _ in range(steps):
        rows = torch.randint(len(records), (min(BATCH, len(records)),), generator=generator)
        total = clipped_sum(settings, learner, records, rows.unique())
        with torch.no_grad():
            for name, gradient in total.items():
                parameters[name] -= settings.train.lr * gradient / len(rows)


def kept(name: str, total: dict[str, Tensor], layout: Layout, part: str) -> float:
    """Share of the factor's power that the filter keeps, over all its tensors."""
    chosen = {key: value for key, value in total.items() if layout[key].part == part}
    smooth = filter_of(name)
    after = sum(float(smooth(layout[key], value, {}, Around()).square().sum()) for key, value in chosen.items())
    return after / sum(float(value.square().sum()) for value in chosen.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path)
    parser.add_argument("-c", action="append", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=20, help="steps without privacy before the measurement")
    parser.add_argument("--records", type=int, default=1024, help="records whose gradients are summed")
    arguments = parser.parse_args()
    settings = resolve(arguments.config, arguments.c)
    learner = ModelStore().learner(settings)
    records = RecordStore()(settings, {"partition-id": 0, "num-partitions": settings.num_supernodes}, learner.base)
    warm_up(settings, learner, records, arguments.steps)
    total = clipped_sum(settings, learner, records, torch.arange(min(arguments.records, len(records))))
    print(f"{settings.model.name} on {settings.data.name}, after {arguments.steps} steps; white noise: {WHITE:.3f}")
    print("| factor | filter | power kept | gain in signal-to-noise |\n|---|---|---|---|")
    for part in (LORA_A, LORA_B):
        for name in ("gauss5", "gauss5-permuted"):
            share = kept(name, total, learner.adapter.layout, part)
            print(f"| {part.removeprefix('lora_')} | {name} | {share:.3f} | {share / WHITE:.2f} |")


if __name__ == "__main__":
    main()
