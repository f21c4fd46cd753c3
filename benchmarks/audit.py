"""The audit's bounds on mechanisms that keep their ε: how much they show, and how often they cry wolf. python -m benchmarks.audit

    python -m benchmarks.audit                 the table, and 500 repetitions of a small mechanism (about two minutes on one core)
    python -m benchmarks.audit --honest 0      the table alone

Canaries are drawn at the level of the mechanism: 1,000 inside and 1,000 outside, each with releases of its own. Draws follow from
a seed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping

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
    refuted,
)
from lalora_flwr.privacy.accounting import noise_multiplier_for
from lalora_flwr.privacy.events import SampledGaussian

DELTA = 1e-5
REPEATS = 6
CANARIES = 1000  # of each kind
MECHANISMS = ((10.0, 1.0, 4), (3.0, 0.145, 150), (2.96, 0.0256, 150))  # ε, q, steps
HONEST = (3.0, 0.2, 10)


def separations(
    steps: SampledGaussian, canaries: int, cuts: Mapping[float, tuple[float, ...]], random: np.random.Generator
) -> list[Separation]:
    """Scores of canaries under each suspected noise."""
    sigma, q, times = steps
    scores = {suspected: (np.zeros(canaries), np.zeros(canaries)) for suspected in SUSPECTED}
    for _ in range(times):
        there = (random.random(canaries) < q).astype(float)
        inside, outside = (shift + sigma * random.standard_normal(canaries) for shift in (there, 0 * there))
        for suspected, (one, other) in scores.items():
            one += log_likelihood_ratio(inside, suspected * sigma, q)
            other += log_likelihood_ratio(outside, suspected * sigma, q)
    return [Separation(*scores[noise], cuts[noise]) for noise in SUSPECTED]


def table(random: np.random.Generator) -> None:
    """What each bound shows of mechanisms whose ε is known."""
    print("| ε | q | steps | Clopper-Pearson | Gaussian pair | one run |\n|---|---|---|---|---|---|")
    for epsilon, q, times in MECHANISMS:
        steps = SampledGaussian(noise_multiplier_for(epsilon, DELTA, q, times), q, times)
        groups = [Group((steps,), CANARIES)]
        cuts = {noise: cuts_of(groups, noise, random) for noise in SUSPECTED}
        found = []
        for _ in range(REPEATS):
            tests = separations(steps, CANARIES, cuts, random)
            inside, outside = tests[0].inside, tests[0].outside
            pair = gaussian_pair(inside, outside, DELTA)
            found.append((clopper_pearson(tests, groups, DELTA, random), pair.estimate, one_run(inside, outside, DELTA)))
        cells = [f"{statistics.mean(column):.2f} ± {statistics.stdev(column):.2f}" for column in zip(*found, strict=True)]
        print(f"| {epsilon:g} | {q:g} | {times} | {' | '.join(cells)} |", flush=True)


def alarms(repetitions: int, random: np.random.Generator) -> None:
    """How often the bound that decides calls a claim false that is kept."""
    epsilon, q, times = HONEST
    steps = SampledGaussian(noise_multiplier_for(epsilon, DELTA, q, times), q, times)
    groups = [Group((steps,), CANARIES)]
    cuts = {noise: cuts_of(groups, noise, random) for noise in SUSPECTED}
    false = sum(refuted(separations(steps, CANARIES, cuts, random), groups, 1.0, random) for _ in range(repetitions))
    print(f"false alarms of Clopper-Pearson's bound (ε = {epsilon:g}, q = {q:g}, {times} steps): {false} of {repetitions}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--honest", type=int, default=500, help="repetitions that count false alarms")
    repetitions = parser.parse_args().honest
    table(np.random.default_rng(0))
    if repetitions:
        alarms(repetitions, np.random.default_rng(1))


if __name__ == "__main__":
    main()
