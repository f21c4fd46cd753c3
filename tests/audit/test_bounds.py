"""The three bounds: against closed forms, a literal transcription, and mechanisms whose ε is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from lalora_flwr.audit.bounds import (
    SUSPECTED,
    Group,
    Separation,
    clopper_pearson,
    cuts_of,
    epsilon_of_gaussians,
    gaussian_pair,
    log_likelihood_ratio,
    one_run,
    p_value,
)
from lalora_flwr.privacy.accounting import noise_multiplier_for
from lalora_flwr.privacy.events import SampledGaussian

DELTA = 1e-5


def attack(
    steps: SampledGaussian, noise: float, canaries: int, random: np.random.Generator
) -> tuple[list[Separation], list[Group]]:
    """Scores of a mechanism with ``noise`` times the noise it claims."""
    sigma, q, times = steps
    groups = [Group((steps,), canaries)]
    scores = {suspected: [np.zeros(canaries), np.zeros(canaries)] for suspected in SUSPECTED}
    for _ in range(times):
        there = (random.random(canaries) < q).astype(float)
        inside, outside = (shift + noise * sigma * random.standard_normal(canaries) for shift in (there, 0 * there))
        for suspected, (one, other) in scores.items():
            one += log_likelihood_ratio(inside, suspected * sigma, q)
            other += log_likelihood_ratio(outside, suspected * sigma, q)
    return [Separation(one, other, cuts_of(groups, suspected, random)) for suspected, (one, other) in scores.items()], groups


@pytest.mark.parametrize(("epsilon", "q", "times", "least"), [(10.0, 1.0, 4, 6.7), (3.0, 0.145, 40, 1.0)])
def test_an_honest_mechanism_survives_with_a_bound_near_its_epsilon(epsilon: float, q: float, times: int, least: float) -> None:
    random = np.random.default_rng(1)
    steps = SampledGaussian(noise_multiplier_for(epsilon, DELTA, q, times), q, times)
    tests, groups = attack(steps, 1.0, 1000, random)
    assert least < clopper_pearson(tests, groups, DELTA, random) < epsilon
    assert one_run(tests[0].inside, tests[0].outside, DELTA) < epsilon


@pytest.mark.parametrize("noise", [0.5, 0.2])
def test_too_little_noise_is_refuted(noise: float) -> None:
    random = np.random.default_rng(2)
    steps = SampledGaussian(noise_multiplier_for(3.0, DELTA, 0.145, 40), 0.145, 40)
    tests, groups = attack(steps, noise, 500, random)
    assert clopper_pearson(tests, groups, DELTA, random) > 3.0


@pytest.mark.slow
def test_the_bound_holds_in_at_least_95_of_100_repetitions() -> None:
    random = np.random.default_rng(3)
    steps = SampledGaussian(noise_multiplier_for(3.0, DELTA, 0.2, 10), 0.2, 10)
    bounds = []
    for _ in range(100):
        tests, groups = attack(steps, 1.0, 500, random)
        bounds.append(clopper_pearson(tests, groups, DELTA, random))
    assert sum(bound <= 3.0 for bound in bounds) >= 95


@given(st.floats(0.05, 8.0), st.sampled_from([1e-3, 1e-5]))
def test_epsilon_of_two_gaussians_is_that_of_dp_accounting(mu: float, delta: float) -> None:
    epsilon = epsilon_of_gaussians(mu, delta)
    if epsilon > 1e-9:
        loss = GaussianPrivacyLoss(1 / mu)
        assert math.isclose(loss.get_delta_for_epsilon(epsilon), delta, rel_tol=1e-6)


def test_the_pair_estimates_the_distance_of_two_gaussians() -> None:
    random = np.random.default_rng(4)
    pair = gaussian_pair(2.0 + random.standard_normal(4000), random.standard_normal(4000), DELTA)
    assert pair.lower < epsilon_of_gaussians(2.0, DELTA) and abs(pair.estimate - epsilon_of_gaussians(2.0, DELTA)) < 0.5
    assert gaussian_pair(np.ones(5), np.zeros(5), DELTA).lower == math.inf
    assert gaussian_pair(np.ones(5), np.ones(5), DELTA).estimate == 0.0


@given(st.integers(2, 200), st.floats(0.0, 1.0), st.floats(0.0, 6.0), st.sampled_from([0.0, 1e-5, 1e-3]))
def test_steinkes_p_value_is_that_of_the_papers_code(guesses: int, share: float, epsilon: float, delta: float) -> None:
    """As in its appendix D, literally."""
    m, r, v = 2 * guesses, guesses, round(share * guesses)
    q = 1 / (1 + math.exp(-epsilon))
    beta = binom.sf(v - 1, r, q)
    alpha, total = 0.0, 0.0
    for i in range(1, v + 1):
        total = total + binom.pmf(v - i, r, q)
        if total > i * alpha:
            alpha = total / i
    assert math.isclose(p_value(m, r, v, epsilon, delta), min(beta + alpha * delta * 2 * m, 1.0), rel_tol=1e-9, abs_tol=1e-300)
