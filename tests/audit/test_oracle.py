"""The bounds against those of jax_privacy's auditing: the same scores, the same numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from lalora_flwr.audit.attacks import auc, rates
from lalora_flwr.audit.bounds import Scores, _limits, _one_run, epsilon_of_gaussians

auditing: Any = pytest.importorskip("jax_privacy.auditing")

CASES = [(0, 0.5, 200), (1, 1.5, 500), (2, 3.0, 300)]  # seed, distance, canaries of each kind


def drawn(seed: int, distance: float, canaries: int) -> tuple[Scores, Scores]:
    random = np.random.default_rng(seed)
    return distance + random.standard_normal(canaries), random.standard_normal(canaries)


@pytest.mark.parametrize("delta", [1e-5, 1e-3])
@pytest.mark.parametrize("cut", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_one_run_and_clopper_pearson_at_a_threshold(case: tuple[int, float, int], cut: float, delta: float) -> None:
    inside, outside = drawn(*case)
    oracle, at = auditing.CanaryScoreAuditor(inside, outside), auditing.Explicit(cut)
    hits, alarms = int((inside >= cut).sum()), int((outside >= cut).sum())
    ours = _one_run(len(inside) + len(outside), hits + alarms, hits, delta, 0.05)
    assert math.isclose(ours, oracle.epsilon_one_run(0.05, delta, threshold_strategy=at), abs_tol=1e-5)
    right, wrong = _limits(inside >= cut, outside >= cut, 0.05 / 2)
    ours = max(0.0, math.log((right - delta) / wrong)) if right > delta else 0.0
    assert math.isclose(ours, oracle.epsilon_clopper_pearson(0.05, delta, threshold_strategy=at), rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_pair_of_gaussians_that_all_thresholds_allow(case: tuple[int, float, int]) -> None:
    inside, outside = drawn(*case)
    oracle = auditing.CanaryScoreAuditor(inside, outside)
    cuts = oracle._thresholds  # it takes those on the convex hull of the curve
    limits = np.array([_limits(inside >= cut, outside >= cut, 0.05 / (2 * len(cuts))) for cut in cuts])
    kept = limits[np.maximum(1 - limits[:, 0], limits[:, 1]) < 1 - 1e-5]
    mu = float(np.abs(norm.isf(kept[:, 1]) - norm.ppf(1 - kept[:, 0])).max())
    assert math.isclose(epsilon_of_gaussians(mu, 1e-5), oracle.epsilon_from_gdp(0.05, 1e-5), abs_tol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_curve_of_an_attack(case: tuple[int, float, int]) -> None:
    """Its curve is the convex hull of ours: the corners are the same, and the area is a little larger."""
    inside, outside = drawn(*case)
    oracle = auditing.CanaryScoreAuditor(inside, outside)
    assert 0 <= oracle.attack_auroc() - auc(inside, outside) < 0.02
    corners = {int((outside >= threshold).sum()) for threshold in oracle._thresholds} - {len(outside)}
    assert len(corners) > 5
    for alarms in corners:
        share = alarms / len(outside)
        assert math.isclose(rates(inside, outside, share, 0.05).tpr, float(oracle.tpr_at_given_fpr(share)), rel_tol=1e-9)
