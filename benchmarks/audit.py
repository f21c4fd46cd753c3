"""The audit's bounds on mechanisms that keep their ε: how much they show, and how often they cry wolf. python -m benchmarks.audit

    python -m benchmarks.audit                 the table, and 500 repetitions of a small mechanism (about 5 minutes on one core)
    python -m benchmarks.audit --honest 0      the table alone

Canaries are drawn at the level of the mechanism: 1,000 inside and 1,000 outside, each with releases of its own. Draws follow from
a seed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from lalora_flwr.audit.bounds import (
    SUSPECTED,
    Group,
    Separation,
    clopper_pearson,
    cuts_of,
    gaussian_pair,
    log_likelihood_ratio,
    one_run,
)
from lalora_flwr.privacy.accounting import noise_multiplier_for
from lalora_flwr.privacy.events import SampledGaussian

DELTA = 1e-5
REPEATS = 6
CANARIES = 1000  # of each kind
MECHANISMS = ((10.0, 1.0, 4), (3.0, 0.145, 150), (2.96, 0.0256, 150))  # ε, q, steps
HONEST = (3.0, 0.2, 10)


def attack(steps: SampledGaussian, canaries: int, random: np.random.Generator) -> tuple[list[Separation], list[Group]]:
    """Scores of canaries under each suspected noise, and what the canaries went through."""
    sigma, q, times = steps
    scores = {suspected: (np.zeros(canaries), np.zeros(canaries)) for suspected in SUSPECTED}
    for _ in range(times):
        there = (random.random(canaries) < q).astype(float)
        inside, outside = (shift + sigma * random.standard_normal(canaries) for shift in (there, 0 * there))
        for suspected, (one, other) in scores.items():
            one += log_likelihood_ratio(inside, suspected * sigma, q)
            other += log_likelihood_ratio(outside, suspected * sigma, q)
    groups = [Group((steps,), canaries)]
    return [Separation(*scores[noise], cuts_of(groups, noise, random)) for noise in SUSPECTED], groups


def bounds_of(epsilon: float, q: float, times: int, canaries: int, random: np.random.Generator) -> tuple[float, float, float]:
    """Clopper-Pearson's bound, the Gaussian pair's estimate, and Steinke's bound, of one attack."""
    steps = SampledGaussian(noise_multiplier_for(epsilon, DELTA, q, times), q, times)
    tests, groups = attack(steps, canaries, random)
    inside, outside = tests[0].inside, tests[0].outside
    pair = gaussian_pair(inside, outside, DELTA)
    return clopper_pearson(tests, groups, DELTA, random), pair.estimate, one_run(inside, outside, DELTA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--honest", type=int, default=500, help="repetitions that count false alarms")
    repetitions = parser.parse_args().honest
    random = np.random.default_rng(0)
    print("| ε | q | steps | Clopper-Pearson | Gaussian pair | one run |\n|---|---|---|---|---|---|")
    for epsilon, q, times in MECHANISMS:
        found = [bounds_of(epsilon, q, times, CANARIES, random) for _ in range(REPEATS)]
        cells = [f"{statistics.mean(column):.2f} ± {statistics.stdev(column):.2f}" for column in zip(*found, strict=True)]
        print(f"| {epsilon:g} | {q:g} | {times} | {' | '.join(cells)} |", flush=True)
    if repetitions:
        begun = time.process_time()
        epsilon, q, times = HONEST
        found = [bounds_of(epsilon, q, times, CANARIES // 2, random) for _ in range(repetitions)]
        for name, column in zip(("Clopper-Pearson", "Gaussian pair", "one run"), zip(*found, strict=True), strict=True):
            alarms = sum(bound > epsilon for bound in column)
            said = f"above ε = {epsilon:g} in {alarms} of {repetitions} repetitions"
            print(f"{name}: {said} (q = {q:g}, {times} steps), median {statistics.median(column):.2f}")
        print(f"{(time.process_time() - begun) / repetitions:.2f} seconds of a core each")


if __name__ == "__main__":
    main()
