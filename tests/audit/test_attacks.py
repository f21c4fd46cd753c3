"""Membership inference as statistics: against closed forms, literal transcriptions, and mechanisms whose ε is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

from lalora_flwr.audit.attacks import auc, implied_epsilon, offline, online, rates


def test_the_area_is_that_of_two_gaussians() -> None:
    random = np.random.default_rng(0)
    found = auc(1.0 + random.standard_normal(20_000), random.standard_normal(20_000))
    assert abs(found - norm.cdf(1 / math.sqrt(2))) < 0.01
    assert auc(np.ones(3), np.ones(4)) == 0.5


def test_rates_and_their_limits() -> None:
    outside = np.arange(297.0)
    at = rates(np.array([296.0, 296.5, 1.0, 400.0]), outside, 0.001, 0.05)
    assert (at.alarms, at.tpr) == (0, 0.5) and at.fpr_upper == pytest.approx(1 - 0.05 ** (1 / 297))
    assert at.tpr_lower < 0.5 and rates(np.zeros(5), outside, 0.001, 0.05).tpr_lower == 0.0
    at = rates(np.array([293.5, 294.5]), outside, 0.01, 0.05)  # two of 297 may exceed it: 295 and 296
    assert (at.alarms, at.tpr) == (2, 0.5)


def test_the_limit_of_false_positives_holds_though_the_scores_set_the_threshold() -> None:
    random, held = np.random.default_rng(1), 0
    for _ in range(400):
        outside = random.random(50)  # above t there are 1 - t of all
        at = rates(outside, outside, 0.04, 0.05)
        held += 1 - np.sort(outside)[-1 - at.alarms] <= at.fpr_upper
    assert held >= 370  # 380 expected


@pytest.mark.parametrize(("epsilon", "least"), [(0.0, 0.0), (2.0, 1.2)])
def test_the_implied_epsilon_of_randomised_answers_stays_below_theirs(epsilon: float, least: float) -> None:
    random, bounds = np.random.default_rng(2), []
    right = 1 / (1 + math.exp(-epsilon))
    for _ in range(100):
        answers = [np.where(random.random(2000) < right, truth, 1.0 - truth) for truth in (1.0, 0.0)]
        inside, outside = (answer + 1e-3 * random.random(2000) for answer in answers)
        bounds.append(implied_epsilon(inside, outside, 0.0))
    assert sum(bound <= epsilon for bound in bounds) >= 95 and np.median(bounds) >= least


def test_a_member_that_scores_low_gives_as_much_away() -> None:
    scores = np.random.default_rng(3).standard_normal((2, 400))
    assert implied_epsilon(scores[0] + 4, scores[1], 1e-5) == pytest.approx(implied_epsilon(-scores[1], -scores[0] - 4, 1e-5))
    assert implied_epsilon(scores[0] + 4, scores[1], 1e-5) > 2


def test_lira_is_the_ratio_of_the_densities() -> None:
    random = np.random.default_rng(4)
    shadows, inside = random.standard_normal((8, 5)), random.random((8, 5)) < 0.5
    inside[0], inside[1] = True, False
    attacked, scores = random.standard_normal(5), np.zeros(5)
    means, deviations = {}, {}
    for member in (True, False):
        means[member] = np.array([shadows[inside[:, i] == member, i].mean() for i in range(5)])
        left = np.concatenate([shadows[inside[:, i] == member, i] - means[member][i] for i in range(5)])
        deviations[member] = math.sqrt((left**2).sum() / (len(left) - 5))
    for i in range(5):
        scores[i] = norm.logpdf(attacked[i], means[True][i], deviations[True])
        scores[i] -= norm.logpdf(attacked[i], means[False][i], deviations[False])
    assert np.allclose(online(attacked, shadows, inside), scores)
    assert np.allclose(offline(attacked, shadows, ~inside), (attacked - means[False]) / deviations[False])


def test_lira_tells_hard_records_from_members_where_a_threshold_does_not() -> None:
    random = np.random.default_rng(5)
    hard = 10 * random.standard_normal(1000)
    inside = random.random((21, 1000)) < 0.5
    confidences = hard + 2.0 * inside + random.standard_normal((21, 1000))
    truth = inside[0]
    plain = auc(confidences[0][truth], confidences[0][~truth])
    for scores in (
        online(confidences[0], confidences[1:], inside[1:]),
        offline(confidences[0], confidences[1:], ~inside[1:]),
    ):
        assert auc(scores[truth], scores[~truth]) > 0.85 > 0.65 > plain


def test_a_record_that_no_shadow_run_had_is_no_crash() -> None:
    shadows, inside = np.zeros((3, 2)), np.array([[True, False]] * 3)
    assert np.isfinite(online(np.ones(2), shadows, inside)).all()
