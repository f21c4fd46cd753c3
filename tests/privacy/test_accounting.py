"""ε against two independent accountants: Google's PLD (dp_accounting) and Opacus' own PRV and RDP, called directly."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq
from scipy.special import ndtr

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.privacy.accounting import epsilon_spent, noise_multiplier_for
from lalora_flwr.privacy.counting import at_least
from lalora_flwr.privacy.events import SampledGaussian, Target

GRID: list[tuple[list[SampledGaussian], float]] = [
    ([(1.0, 0.1, 150)], 1e-4),
    ([(0.8, 0.02, 1000)], 1e-5),
    ([(4.0, 1.0, 20)], 1e-4),
    ([(10.0, 0.15, 150)], 1e-4),
    ([(60.0, 0.15, 150)], 1e-4),
    ([(0.6, 0.15, 10)], 1e-4),
    ([(2.0, 0.5, 60)], 1e-5),
    ([(5.0, 0.5, 1)], 1e-6),
    ([(1.0, 0.1, 50), (1.5, 0.1, 50), (3.0, 1.0, 5)], 1e-4),
]
IDS = [f"{'+'.join(f'{s:g}/{q:g}/{n}' for s, q, n in history)}" for history, _ in GRID]


def pld(history: Sequence[SampledGaussian], delta: float) -> float:
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    for sigma, q, steps in history:
        accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), steps))
    return accountant.get_epsilon(delta)


def gaussian_epsilon(sigma: float, steps: int, delta: float) -> float:
    """ε of full-batch Gaussian steps in closed form (Balle and Wang 2018)."""
    mu = math.sqrt(steps) / sigma

    def gap(eps: float) -> float:
        return ndtr(mu / 2 - eps / mu) - math.exp(eps) * ndtr(-mu / 2 - eps / mu) - delta

    return brentq(gap, 0, 100)


@pytest.mark.parametrize(("history", "delta"), GRID, ids=IDS)
def test_the_headline_is_googles_pld_within_a_hundredth(history: list[SampledGaussian], delta: float) -> None:
    """Both are upper bounds, by the same discretisation on other lattices."""
    google = pld(history, delta)
    assert google - 0.001 <= epsilon_spent(history, delta) <= google + 0.01


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(("history", "delta"), GRID, ids=IDS)
def test_prv_is_at_most_two_hundredths_above_the_headline(history: list[SampledGaussian], delta: float) -> None:
    headline = epsilon_spent(history, delta)
    assert headline - 0.001 <= epsilon_spent(history, delta, "prv") <= headline + 0.02


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(("history", "delta"), GRID, ids=IDS)
def test_prv_is_that_of_opacus(history: list[SampledGaussian], delta: float) -> None:
    accountant = PRVAccountant()
    accountant.history = history
    for eps_error in (0.01, 0.001):
        own = accountant.get_epsilon(delta, eps_error=eps_error)
        assert epsilon_spent(history, delta, "prv") == pytest.approx(own, abs=0.012)


def test_prv_is_refused_where_it_understates() -> None:
    """4.15 instead of 4.23 there (σ = 1, q = 0.01, 1,000 steps)."""
    with pytest.raises(ConfigError, match="use pld"):
        epsilon_spent([(1.0, 0.01, 1000)], 1e-13, "prv")
    assert epsilon_spent([(1.0, 0.01, 1000)], 1e-13) == pytest.approx(4.23, abs=0.005)


@pytest.mark.filterwarnings("ignore:Optimal order", "ignore:divide by zero")
@pytest.mark.parametrize(("history", "delta"), GRID, ids=IDS)
def test_rdp_is_that_of_opacus_and_bounds_the_headline_from_above(history: list[SampledGaussian], delta: float) -> None:
    accountant = RDPAccountant()
    accountant.history = history
    rdp, tight = epsilon_spent(history, delta, "rdp"), epsilon_spent(history, delta)
    assert rdp == pytest.approx(accountant.get_epsilon(delta), rel=1e-12)
    assert tight <= rdp <= (1.3 * tight if tight > 0.2 else tight + 0.1)


@pytest.mark.parametrize(("sigma", "steps", "delta"), [(4.0, 20, 1e-4), (1.0, 1, 1e-5), (30.0, 40, 1e-4)])
def test_full_batches_agree_with_the_closed_form(sigma: float, steps: int, delta: float) -> None:
    exact = gaussian_epsilon(sigma, steps, delta)
    assert exact <= epsilon_spent([(sigma, 1.0, steps)], delta) <= 1.001 * exact


@pytest.mark.parametrize("accountant", ["pld", "prv", "rdp"])
def test_nothing_spent_is_zero_and_a_step_without_noise_infinite(accountant: str) -> None:
    assert epsilon_spent([], 1e-4, accountant) == 0.0
    assert epsilon_spent([(1.0, 0.1, 0)], 1e-4, accountant) == 0.0
    assert epsilon_spent([(0.0, 0.1, 0)], 1e-4, accountant) == 0.0
    assert epsilon_spent([(0.0, 0.1, 1)], 1e-4, accountant) == math.inf
    assert epsilon_spent([(5.0, 0.1, 9), (0.0, 0.1, 1)], 1e-4, accountant) == math.inf


@pytest.mark.parametrize("accountant", ["pld", "prv", "rdp"])
def test_composition_costs_less_than_the_sum_and_more_than_each_part(accountant: str) -> None:
    first, second = (1.0, 0.1, 100), (2.0, 0.2, 100)
    parts = [epsilon_spent([segment], 1e-4, accountant) for segment in (first, second)]
    both = epsilon_spent([first, second], 1e-4, accountant)
    assert max(parts) < both < 0.9 * sum(parts)


@pytest.mark.parametrize("accountant", ["pld", "prv", "rdp"])
def test_how_a_history_is_cut_does_not_matter(accountant: str) -> None:
    whole = epsilon_spent([(1.0, 0.1, 60)], 1e-4, accountant)
    cut = [(1.0, 0.1, 20), (1.0, 0.1, 0), (1.0, 0.1, 40)]
    assert epsilon_spent(cut, 1e-4, accountant) == pytest.approx(whole, rel=0.002)


@pytest.mark.parametrize("accountant", ["pld", "prv", "rdp"])
def test_epsilon_grows_with_steps_and_rate_and_falls_with_sigma_and_delta(accountant: str) -> None:
    def spent(sigma: float = 1.0, q: float = 0.1, steps: int = 50, delta: float = 1e-4) -> float:
        return epsilon_spent([(sigma, q, steps)], delta, accountant)

    middle = spent()
    assert spent(sigma=1.2) < middle < spent(sigma=0.9)
    assert spent(q=0.08) < middle < spent(q=0.12)
    assert spent(steps=40) < middle < spent(steps=60)
    assert spent(delta=1e-3) < middle < spent(delta=1e-5)


@pytest.mark.parametrize("accountant", ["pld", "prv"])
def test_epsilon_never_falls_as_small_steps_add_up(accountant: str) -> None:
    """Across 1.1, where PRV's fine grid gives way to its coarse one."""
    spent = [epsilon_spent([(4.0, 0.2, steps)], 1e-4, accountant) for steps in range(40, 70, 3)]
    assert spent[0] < 1.1 < spent[-1]
    assert spent == sorted(spent)


@pytest.mark.parametrize(("q", "steps", "delta"), [(0.145, 150, 1e-4), (0.001, 20_000, 1e-7), (1.0, 3, 1e-12), (0.3, 1, 1e-3)])
@pytest.mark.parametrize("epsilon", [0.01, 0.1, 1.0, 3.0, 8.0, 100.0])
def test_calibrated_noise_spends_the_budget_and_no_more(epsilon: float, q: float, steps: int, delta: float) -> None:
    sigma = noise_multiplier_for(epsilon, delta, q, steps)
    assert 0.99 * epsilon <= epsilon_spent([(sigma, q, steps)], delta) <= epsilon


@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_googles_pld_agrees_that_calibrated_noise_keeps_the_budget(epsilon: float) -> None:
    sigma = noise_multiplier_for(epsilon, 1e-4, 0.145, 150)
    assert 0.99 * epsilon <= pld([(sigma, 0.145, 150)], 1e-4) <= epsilon


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_noise_for_what_other_steps_leave_spends_the_budget_with_them_and_no_more(epsilon: float, share: float) -> None:
    before = (SampledGaussian(noise_multiplier_for(share * epsilon, 1e-4, 1.0, 1), 1.0, 1),)
    sigma = noise_multiplier_for(epsilon, 1e-4, 0.145, 149, before=before)
    assert sigma > noise_multiplier_for(epsilon, 1e-4, 0.145, 149)
    together = [*before, SampledGaussian(sigma, 0.145, 149)]
    assert 0.99 * epsilon <= epsilon_spent(together, 1e-4) <= epsilon
    assert pld(together, 1e-4) <= epsilon * 1.001


def test_nothing_is_left_of_a_budget_that_other_steps_spent() -> None:
    with pytest.raises(ConfigError, match="no noise level"):
        noise_multiplier_for(1.0, 1e-4, 0.1, 5, before=(SampledGaussian(1.0, 1.0, 1),))


FIRST, THEN = SampledGaussian(4.0, 1.0, 2), SampledGaussian(1.0, 0.1, 5)


@pytest.mark.parametrize(
    ("history", "steps", "before", "want"),
    [
        ([], 0, 0, []),
        ([], 7, 2, [FIRST, THEN]),
        ([], 6, 1, [FIRST._replace(steps=1), THEN]),
        ([FIRST], 7, 2, [FIRST, THEN]),
        ([FIRST, THEN], 3, 1, [FIRST, THEN]),
        ([THEN], 7, 2, [THEN, FIRST]),
        ([THEN], 2, 2, [THEN, FIRST]),
    ],
)
def test_what_a_resumed_run_took_before_is_counted_at_its_own_noise(
    history: list[SampledGaussian], steps: int, before: int, want: list[SampledGaussian]
) -> None:
    target = Target(8.0, 1e-4, 100, "pld", (FIRST,))
    assert at_least(history, steps, THEN.noise_multiplier, THEN.sample_rate, target.begun(before)) == want
    assert target.alike == 98


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.5, 8.0])
def test_calibration_by_rdp_keeps_to_rdp_and_adds_more_noise(epsilon: float) -> None:
    sigma = noise_multiplier_for(epsilon, 1e-4, 0.1, 30, "rdp")
    assert 0.98 * epsilon <= epsilon_spent([(sigma, 0.1, 30)], 1e-4, "rdp") <= epsilon
    assert sigma > noise_multiplier_for(epsilon, 1e-4, 0.1, 30)


@pytest.mark.slow
def test_calibration_by_prv_keeps_to_prv() -> None:
    sigma = noise_multiplier_for(2.0, 1e-4, 0.1, 30, "prv")
    assert 1.98 <= epsilon_spent([(sigma, 0.1, 30)], 1e-4, "prv") <= 2.0


def test_no_budget_limit_needs_no_noise() -> None:
    for accountant in ("pld", "prv", "rdp"):
        assert noise_multiplier_for(math.inf, 1e-4, 0.1, 10, accountant) == 0.0


def test_noise_falls_with_epsilon_and_grows_with_steps_and_rate() -> None:
    def sigma(epsilon: float = 2.0, q: float = 0.2, steps: int = 20) -> float:
        return noise_multiplier_for(epsilon, 1e-4, q, steps, "rdp")

    middle = sigma()
    assert sigma(epsilon=4.0) < middle < sigma(epsilon=1.0)
    assert sigma(q=0.1) < middle < sigma(q=0.4)
    assert sigma(steps=5) < middle < sigma(steps=80)


def test_an_epsilon_out_of_reach_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.epsilon = 1e-09: no noise level found.*choose a larger"):
        noise_multiplier_for(1e-9, 1e-12, 1.0, 100)


def test_epsilon_is_never_negative() -> None:
    for accountant in ("pld", "prv", "rdp"):
        assert epsilon_spent([(30.0, 0.01, 2)], 0.5, accountant) == 0.0


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_that_is_no_probability_is_an_error(delta: float) -> None:
    with pytest.raises(ValueError, match="not between 0 and 1"):
        epsilon_spent([(1.0, 0.1, 10)], delta)


@pytest.mark.parametrize("segment", [(-1.0, 0.1, 1), (math.nan, 0.1, 1), (1.0, 0.0, 1), (1.0, 1.1, 1), (1.0, 0.1, -1)])
def test_a_segment_that_is_none_of_the_mechanism_is_an_error(segment: SampledGaussian) -> None:
    with pytest.raises(ValueError, match="not steps of the mechanism"):
        epsilon_spent([segment], 1e-5)


@pytest.mark.parametrize(
    "call", ["epsilon_spent([(1.0, 0.1, 2)], 1e-5, 'prv')", "noise_multiplier_for(3.0, 1e-5, 0.1, 2, 'rdp')"]
)
def test_the_root_logger_stays_as_it_was(call: str) -> None:
    """In a process of its own, since Opacus sets it up when it is first imported."""
    script = f"import logging; from lalora_flwr.privacy.accounting import *; {call}; print(logging.getLogger().handlers)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"
