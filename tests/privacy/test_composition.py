"""The composition behind ε: each part against a slow reference, the whole against other accountants, far out as well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_ndtr
from scipy.stats import norm

from lalora_flwr.privacy.accounting import epsilon_spent
from lalora_flwr.privacy.composition.history import composition, missing
from lalora_flwr.privacy.composition.lattice import NOTHING, Lattice, choose_lattice
from lalora_flwr.privacy.composition.spectrum import compose
from lalora_flwr.privacy.composition.step import ADD, REMOVE, StepLoss, moments, step_loss
from lalora_flwr.privacy.composition.tail import epsilon_at
from lalora_flwr.privacy.events import SampledGaussian

STEPS = [(1.0, 0.01), (0.3, 1e-3), (0.7, 1.0), (30.0, 0.2), (300.0, 1e-5), (2.0, 0.999)]
BOTH = pytest.mark.parametrize("direction", [REMOVE, ADD], ids=["remove", "add"])


def exact_delta(sigma: float, q: float, epsilon: float, direction: int) -> float:
    """δ of one step in closed form: where the loss is above ε, mass of the one distribution minus e^ε of the other."""
    if direction == REMOVE:
        share = (math.exp(epsilon) - 1 + q) / q
        x = -math.inf if share <= 0 else sigma**2 * math.log(share) + 0.5
        mixture = (1 - q) * norm.sf(x / sigma) + q * norm.sf((x - 1) / sigma)
        return float(mixture - math.exp(epsilon) * norm.sf(x / sigma))
    share = (math.exp(-epsilon) - 1 + q) / q
    if share <= 0:
        return 0.0
    x = sigma**2 * math.log(share) + 0.5
    mixture = (1 - q) * norm.cdf(x / sigma) + q * norm.cdf((x - 1) / sigma)
    return float(norm.cdf(x / sigma) - math.exp(epsilon) * mixture)


def delta_of(losses: np.ndarray, probabilities: np.ndarray, infinite: float, epsilon: float) -> float:
    above = losses > epsilon
    return infinite + float(-np.expm1(epsilon - losses[above]) @ probabilities[above])


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε of one Gaussian step with noise 1 / mu (Balle and Wang 2018), in logarithms."""

    def log_delta(epsilon: float) -> float:
        upper, lower = log_ndtr(mu / 2 - epsilon / mu), epsilon + log_ndtr(-mu / 2 - epsilon / mu)
        return upper + math.log1p(-math.exp(lower - upper)) if lower < upper else -math.inf

    if log_delta(0.0) <= math.log(delta):
        return 0.0
    low, high = 0.0, 1e7
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if log_delta(middle) > math.log(delta) else (low, middle)
    return high


def google(history: Sequence[SampledGaussian], delta: float, interval: float, pessimistic: bool = True) -> float:
    """Google's accountant: connected dots from above, or rounded down for a bound from below."""
    whole = privacy_loss_distribution.identity(interval, pessimistic)
    for sigma, q, steps in history:
        step = privacy_loss_distribution.from_gaussian_mechanism(
            sigma,
            pessimistic_estimate=pessimistic,
            value_discretization_interval=interval,
            sampling_prob=q,
            use_connect_dots=pessimistic,
        )
        whole = whole.compose(step.self_compose(steps) if steps > 1 else step)
    return whole.get_epsilon_for_delta(delta)


# one step


@BOTH
@pytest.mark.parametrize(("sigma", "q"), STEPS)
@pytest.mark.parametrize("coarser", [0, 3, 12])
def test_a_steps_losses_never_cost_less_than_the_step_and_no_more_at_the_lattice(
    sigma: float, q: float, direction: int, coarser: int
) -> None:
    loss = step_loss(sigma, q, moments(sigma, q).exponent + coarser)[direction]
    assert loss.infinite + loss.probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert (loss.probabilities >= 0).all()
    kept = loss.losses[:: max(len(loss.losses) // 50, 1)]
    for epsilon in kept:
        exact, own = exact_delta(sigma, q, epsilon, direction), delta_of(loss.losses, loss.probabilities, loss.infinite, epsilon)
        assert own == pytest.approx(exact, abs=1e-12, rel=1e-6)
        between = epsilon + 0.4 * loss.spacing
        assert (
            delta_of(loss.losses, loss.probabilities, loss.infinite, between) >= exact_delta(sigma, q, between, direction) - 1e-13
        )


# composing, against a convolution written out


def convolved(losses: Sequence[tuple[StepLoss, int]], delta: float) -> float:
    """ε by bisection over the whole distribution, composed one step at a time."""
    first, spacing = 0, losses[0][0].spacing
    probabilities, finite = np.ones(1), 1.0
    for loss, times in losses:
        for _ in range(times):
            probabilities, first = np.convolve(probabilities, loss.probabilities), first + loss.first
            finite *= 1 - loss.infinite
    values = spacing * (first + np.arange(len(probabilities)))
    low, high = 0.0, 200.0
    if delta_of(values, probabilities, 1 - finite, 0.0) <= delta:
        return 0.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(values, probabilities, 1 - finite, middle) > delta else (low, middle)
    return high


FEW = [{(1.0, 0.05): 6}, {(0.6, 0.01): 3}, {(3.0, 1.0): 8}, {(1.0, 0.05): 3, (1.3, 0.2): 4, (1.1, 1.0): 1}]


@BOTH
@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("steps", FEW)
def test_composing_is_convolving(steps: dict[tuple[float, float], int], delta: float, direction: int) -> None:
    totals = NOTHING
    for pair, times in steps.items():
        totals = totals.plus(pair, times, True)
    lattice = choose_lattice(totals, direction, delta)
    lattice = replace(lattice, fine=max(moments(*pair).exponent for pair in steps))  # one lattice for all, as convolving needs
    reference = convolved([(step_loss(*pair, lattice.fine)[direction], times) for pair, times in steps.items()], delta)
    own = epsilon_at(delta, compose(steps.items(), direction, lattice), lattice)
    assert reference * (1 - 1e-9) <= own <= reference * (1 + 1e-5) + 1e-9


@BOTH
@settings(deadline=None, max_examples=40)
@given(order=st.integers(30, 56), coarse=st.integers(-3, 3), fine=st.integers(-9, -5), delta=st.floats(1e-10, 1e-2))
def test_on_any_lattice_it_stays_a_bound(direction: int, order: int, coarse: int, fine: int, delta: float) -> None:
    """A circle too narrow, a tilt too strong or a spacing too wide cost tightness only."""
    lattice = Lattice(order, min(fine, coarse - 4), coarse, 4)
    pair, times = (1.0, 0.1), 20
    tight = Lattice(44, -10, 4, 4)
    best = epsilon_at(delta, compose([(pair, times)], direction, tight), tight)
    assert epsilon_at(delta, compose([(pair, times)], direction, lattice), lattice) >= best * (1 - 1e-3)


# the whole, against other accountants

FAR = [  # σ, q, steps, δ, Google's interval
    ((0.3, 1e-3, 100), 1e-6, 1e-4),
    ((0.3, 1e-5, 2000), 1e-9, 5e-4),
    ((0.5, 0.01, 1), 1e-5, 1e-4),
    ((0.7, 6e-4, 2), 1e-6, 1e-5),
    ((0.76, 1e-3, 10), 4e-10, 1e-5),
    ((1.0, 0.01, 1000), 1e-2, 1e-4),
    ((1.0, 0.01, 1000), 1e-10, 1e-4),
    ((1.5, 1e-3, 23), 3e-12, 1e-6),
    ((4.0, 0.1, 10_000), 1e-5, 5e-4),
    ((30.0, 0.1, 100_000), 1e-6, 1e-4),
    ((50.0, 1e-3, 100_000), 1e-5, 1e-6),
    ((300.0, 1.0, 1000), 1e-9, 1e-5),
    ((300.0, 0.5, 1), 1e-5, 1e-6),
]


@pytest.mark.slow  # Google's accountant takes up to seconds
@pytest.mark.parametrize(("segment", "delta", "interval"), FAR)
def test_far_out_it_is_googles_pld(segment: SampledGaussian, delta: float, interval: float) -> None:
    tight, own = google([segment], delta, interval), epsilon_spent([segment], delta)
    assert own == pytest.approx(tight, rel=0.01, abs=0.01)
    assert own <= epsilon_spent([segment], delta, "rdp")


@pytest.mark.parametrize(
    ("segment", "delta"), [((0.5, 0.01, 1), 1e-5), ((1.0, 0.01, 10), 1e-6), ((4.0, 0.1, 100), 1e-5), ((2.0, 1.0, 3), 1e-9)]
)
def test_it_is_never_below_googles_optimistic_bound(segment: SampledGaussian, delta: float) -> None:
    assert epsilon_spent([segment], delta) >= google([segment], delta, 2e-3, pessimistic=False)


@pytest.mark.parametrize("delta", [1e-20, 1e-12, 1e-5, 1e-2, 0.3])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 10.0, 300.0])
@pytest.mark.parametrize("steps", [1, 7, 1000, 100_000])
def test_full_batches_agree_with_the_closed_form_far_out(sigma: float, steps: int, delta: float) -> None:
    exact = gaussian_epsilon(math.sqrt(steps) / sigma, delta)
    assert exact * (1 - 1e-9) <= epsilon_spent([(sigma, 1.0, steps)], delta) <= 1.003 * exact + 1e-5


MIXED = [(0.8, 0.01, 40), (1.3, 0.2, 15), (6.0, 1.0, 30), (40.0, 0.05, 900), (3.0, 1e-3, 5000)]


def test_different_steps_are_googles_pld_in_any_order() -> None:
    own = epsilon_spent(MIXED, 1e-6)
    assert own == pytest.approx(google(MIXED, 1e-6, 1e-3), rel=0.005)
    assert epsilon_spent(MIXED[::-1], 1e-6) == own
    assert epsilon_spent([(s, q, n - 4) for s, q, n in MIXED] + [(s, q, 4) for s, q, _ in MIXED], 1e-6) == own


def test_a_few_tiny_steps_beside_large_ones_cost_next_to_nothing() -> None:
    alone = epsilon_spent([(1.0, 0.1, 50)], 1e-5)
    assert alone <= epsilon_spent([(1.0, 0.1, 50), (300.0, 1e-5, 10)], 1e-5) * (1 + 1e-3)
    assert epsilon_spent([(1.0, 0.1, 50), (300.0, 1e-5, 10)], 1e-5) <= 1.01 * alone


# what must hold for all steps

sigmas = st.floats(0.3, 300).map(lambda x: float(f"{x:.4g}"))
rates = st.one_of(st.floats(-5, 0).map(lambda x: 10**x), st.just(1.0))
counts = st.floats(0, 4).map(lambda x: int(10**x))
deltas = st.floats(-12, -2).map(lambda x: 10**x)
ALMOST = 1 - 1e-3  # lattices of neighbours differ by a factor of two at times
NEAR_ZERO = 1e-6


@settings(deadline=None, max_examples=12)
@given(sigma=sigmas, q=rates, steps=counts, delta=deltas, more=st.floats(1.001, 3))
def test_steps_rate_and_noise_move_it_the_right_way(sigma: float, q: float, steps: int, delta: float, more: float) -> None:
    spent, more_steps = epsilon_spent([(sigma, q, steps)], delta), steps + max(int(steps * (more - 1)), 1)
    assert 0 <= spent < math.inf
    assert epsilon_spent([(sigma, q, more_steps)], delta) >= spent * (1 - 1e-6) - NEAR_ZERO  # on the same lattice
    assert epsilon_spent([(sigma, min(q * more, 1.0), steps)], delta) >= spent * ALMOST - NEAR_ZERO
    assert epsilon_spent([(sigma * more, q, steps)], delta) * ALMOST - NEAR_ZERO <= spent
    assert epsilon_spent([(sigma, q, steps)], delta / more) >= spent * ALMOST - NEAR_ZERO


@settings(deadline=None, max_examples=10)
@given(
    segments=st.lists(st.tuples(st.floats(0.5, 20), st.floats(1e-3, 1.0), st.integers(1, 50)), min_size=2, max_size=5),
    delta=deltas,
)
def test_a_history_costs_at_least_its_parts_and_at_most_their_sum_by_rdp(segments: list[SampledGaussian], delta: float) -> None:
    whole = epsilon_spent(segments, delta)
    assert whole <= epsilon_spent(segments, delta, "rdp") * (1 + 1e-3)
    assert whole >= max(epsilon_spent([segment], delta) for segment in segments) * ALMOST
    assert epsilon_spent(sorted(segments, key=lambda s: s[2]), delta) == whole


# going on from what was composed


known_pairs = st.sampled_from([(1.0, 0.1), (2.0, 0.02), (0.7, 0.01), (9.0, 1.0)])


@settings(deadline=None, max_examples=25)
@given(parts=st.lists(st.tuples(known_pairs, st.integers(1, 40)), min_size=2, max_size=8))
def test_going_on_step_by_step_is_composing_at_once(parts: list[tuple[tuple[float, float], int]]) -> None:
    counts: dict[tuple[float, float], int] = {}
    known = []
    for pair, times in parts:
        counts[pair] = counts.get(pair, 0) + times
        known.append(composition(tuple(sorted(counts.items())), 1e-5, known[::-1]))
    assert known[-1].epsilon() == pytest.approx(composition(known[-1].steps, 1e-5).epsilon(), rel=1e-10)


def test_steps_given_back_are_no_base() -> None:
    one, other = (1.0, 0.1), (2.0, 0.1)
    assert missing(((one, 3),), ((one, 5), (other, 1))) == ((one, 2), (other, 1))
    assert missing(((one, 5), (other, 1)), ((one, 5), (other, 1))) == ()
    assert missing(((one, 6),), ((one, 5), (other, 1))) is None
    assert missing(((one, 1), (other, 1)), ((one, 5),)) is None
