"""Accuracy on the embedded task: the README's three numbers, and the methods over one grid of learning rates.

    python -m benchmarks.digits            the default settings with and without privacy, three seeds
    python -m benchmarks.digits --methods  every method at ε = 3 on the same learning rates, three seeds (about 12 minutes)

Everything runs in this process. Accuracy is that of the last round on the 297 public test records (standard error about
two points). The learning rates are compared on those same records, so the best of a row is a little optimistic.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from typing import Any

from lalora_flwr.engines.inline import run_inline
from lalora_flwr.settings import settings_from

SEEDS = (0, 1, 2)
LEARNING_RATES = (0.125, 0.25, 0.35, 0.5)
METHODS: dict[str, dict[str, Any]] = {
    "la-lora": {"strategy": "la-lora"},
    "la-lora, no filter": {"strategy": "la-lora", "filter.name": "none"},
    "dp-lora": {"strategy": "dp-lora"},
    "dp-lora, gauss5": {"strategy": "dp-lora", "filter.name": "gauss5"},
    "ffa-lora": {"strategy": "ffa-lora"},
    "rolora": {"strategy": "rolora"},
}


def run(values: dict[str, Any]) -> dict[str, Any]:
    """The summary of one run."""
    with tempfile.TemporaryDirectory() as folder:
        summary: dict[str, Any] = json.loads(
            (run_inline(settings_from({**values, "output-dir": folder})) / "summary.json").read_text()
        )
    return summary


def cell(values: dict[str, Any]) -> str:
    """Mean and standard deviation of the accuracy over the seeds."""
    accuracies = [run({**values, "seed": seed})["accuracy"] for seed in SEEDS]
    return f"{statistics.mean(accuracies):.3f} ± {statistics.stdev(accuracies):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", action="store_true", help="compare the methods instead")
    if parser.parse_args().methods:
        print("| method | " + " | ".join(f"lr {lr}" for lr in LEARNING_RATES) + " |")
        print("|---" * (len(LEARNING_RATES) + 1) + "|")
        for name, values in METHODS.items():
            row = " | ".join(cell({**values, "train.lr": lr}) for lr in LEARNING_RATES)
            print(f"| {name} | {row} |", flush=True)
        return
    print(f"frozen model           {run({'num-rounds': 1})['frozen_accuracy']:.3f}")
    print(f"default, private       {cell({})}")
    print(f"default, bfloat16 base {cell({'model.dtype': 'bfloat16'})}")
    print(f"default, epsilon = inf {cell({'privacy.epsilon': float('inf')})}")


if __name__ == "__main__":
    main()
