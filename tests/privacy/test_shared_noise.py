"""A noise that several sites share: the sum of their rounded parts is the Gaussian mechanism's own output."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import kstest, norm

from lalora_flwr.ground.errors import BudgetExhausted
from lalora_flwr.privacy.clip import clip
from lalora_flwr.privacy.counting import RunLedger
from lalora_flwr.privacy.events import Target
from lalora_flwr.privacy.mechanism import EXACT, Mechanism, PrivateSum, Share
from lalora_flwr.privacy.randomness import SystemRandom
from tests.attacks.attacker import Signs
from tests.privacy.sums import CPU, LARGE, MECHANISM, SHAPES, gradients
from tests.reference import OpenLedger


def rounded_normal(centre: float, s: float, reach: int) -> NDArray[np.float64]:
    """P(round(N(centre, s²)) = k) for k from -reach to reach."""
    edges = np.arange(-reach, reach + 2) - 0.5
    return np.diff(norm.cdf(edges, centre, s))


def uniform_sum(count: int, points: int) -> NDArray[np.float64]:
    """Density of the sum of ``count`` uniforms on [-½, ½] on a grid of ``points`` a unit, by convolution of boxes."""
    box = np.ones(points) / points
    out = np.ones(1)
    for _ in range(count):
        out = np.convolve(out, box)
    return out


def of_the_lemma(centres: list[float], s: float, reach: int, points: int = 400) -> NDArray[np.float64]:
    """P(round(Y + U_2 + … + U_n) = k), Y ~ N(Σ centres, n s²), by the midpoint rule."""
    n = len(centres)
    weights = uniform_sum(n - 1, points)
    at = (np.arange(len(weights)) - (len(weights) - 1) / 2) / points
    edges = np.arange(-reach, reach + 2) - 0.5
    cdf = norm.cdf(edges[:, None] - at[None, :], sum(centres), s * math.sqrt(n)) @ weights
    return np.diff(cdf)


@pytest.mark.parametrize("s", [0.5, 0.75, 1.0, 1.5])
@pytest.mark.parametrize("centres", [[0.3, 0.41], [-0.5, 1.25], [0.1, 0.2, 0.7, -3.45]], ids=str)
def test_the_lemma_holds_where_its_error_is_visible(centres: list[float], s: float) -> None:
    """Total variation between the sum of rounded Gaussians and a rounded Gaussian, against the bound of docs/secure_sum.md."""
    reach = 60
    exact = np.ones(1)
    for centre in centres:
        exact = np.convolve(exact, rounded_normal(centre, s, reach))
    middle = len(exact) // 2
    exact = exact[middle - reach : middle + reach + 1]
    variation = 0.5 * float(np.abs(exact - of_the_lemma(centres, s, reach)).sum())
    n = len(centres)
    points = 2 * 6 * s * math.sqrt(n) + n  # lattice points that carry all but 1e-8 of the mass
    bound = 0.5 * points * of_a_point(s, n) + 1e-7
    assert variation <= bound
    if s == 0.5 and n == 2:
        assert variation > 1e-3  # the test would see an error of this size


def of_a_point(s: float, n: int) -> float:
    """b(s, n) of docs/secure_sum.md: how far the probabilities of one integer can lie apart."""
    theta = sum(math.exp(-2 * (math.pi * s * m) ** 2) for m in range(-9, 10))
    tail = sum(math.exp(-((math.pi * s * d) ** 2)) for d in range(1, 9))
    return n * (n - 1) / 2 * theta ** (n - 2) * tail / (s * math.sqrt(math.pi))


def share(total: PrivateSum, source: object, part: Share) -> dict[str, torch.Tensor]:
    return total.release_share(OpenLedger(), source, part)  # type: ignore[arg-type]


def test_a_part_is_the_clipped_sum_and_its_own_noise_on_the_grid() -> None:
    part = Share(0.8, MECHANISM.clip_norm, 5)
    total = PrivateSum(MECHANISM, {n: torch.Size(s) for n, s in SHAPES.items()}, CPU)
    records = gradients([[5.0, 2.0, 1.0], [0.1, 0.1, 0.1], [0.3, math.nan, 0.0]])
    total.add({name: g.clone() for name, g in records.items()})
    exact, _ = clip(records, MECHANISM.clip_norm)
    again = copy.deepcopy(total)
    for name, units in share(total, Signs(0.0), part).items():
        assert units.dtype == torch.int64
        torch.testing.assert_close(units.double() * part.step, exact[name], rtol=0, atol=part.step)
    for name, units in share(again, Signs(1.0), part).items():
        noise = (units.double() * part.step - exact[name]).abs()
        torch.testing.assert_close(noise, torch.full_like(noise, 0.8 * MECHANISM.clip_norm), rtol=1e-7, atol=part.step)


def test_the_sum_over_sites_has_the_noise_that_the_accountant_counts() -> None:
    n, sigma = 4, 1.1
    part = Share(sigma / math.sqrt(n), MECHANISM.clip_norm, n)
    parts = [share(PrivateSum(MECHANISM, LARGE, CPU), SystemRandom(), part) for _ in range(n)]
    for name in LARGE:
        values = sum(one[name] for one in parts).double().flatten() * part.step / (sigma * MECHANISM.clip_norm)
        assert kstest(values.numpy(), "norm").pvalue > 1e-6
        own = parts[0][name].double().flatten() * part.step / part.std
        assert kstest(own.numpy(), "norm").pvalue > 1e-6


KEPT = {"a": torch.Size((300, 400)), "b": torch.Size((200, 300)), "c": torch.Size((150, 400))}


@pytest.mark.parametrize(("s", "sigma"), [(0.7, 1.3), (2.0, 1.3)])
def test_what_stays_has_all_of_the_sites_own_noise(s: float, sigma: float) -> None:
    """Or that of a share, where that is more: an adversary with all other sites on its side is told that all has a share's."""
    mechanism, part = Mechanism(sigma, 0.5, 0.5, 8.0), Share(s, 0.5, 4)
    released = PrivateSum(mechanism, KEPT, CPU).release_share(OpenLedger(), SystemRandom(), part, {"b"})
    assert list(released) == ["a", "b", "c"]
    assert [released[name].dtype for name in KEPT] == [torch.int64, torch.float32, torch.int64]
    for name in ("a", "c"):
        values = released[name].double().flatten() * part.step / (s * 0.5)
        assert kstest(values.numpy(), "norm").pvalue > 1e-6
    values = released["b"].double().flatten() * 8.0 / (max(s, sigma) * 0.5)
    assert kstest(values.numpy(), "norm").pvalue > 1e-6
    rows = [released[name].double().flatten()[:60_000] for name in KEPT]  # no draw is there twice
    assert np.abs(np.corrcoef(torch.stack(rows).numpy()) - np.eye(3)).max() < 0.03


def test_one_record_moves_what_is_summed_and_what_stays_by_c_together() -> None:
    part = Share(0.8, MECHANISM.clip_norm, 5)
    records = gradients([[5.0, 2.0, 1.0], [0.1, 0.1, 0.1], [0.3, 40.0, 0.0], [0.0, 0.0, 9.0]])
    kept = {list(SHAPES)[1]}

    def let_out(count: int) -> torch.Tensor:
        total = PrivateSum(MECHANISM, {n: torch.Size(s) for n, s in SHAPES.items()}, CPU)
        total.add({name: g[:count].clone() for name, g in records.items()})
        found = total.release_share(OpenLedger(), Signs(1.0), part, kept)  # type: ignore[arg-type]
        units = {n: MECHANISM.expected_batch if n in kept else part.step for n in found}
        return torch.cat([value.double().flatten() * units[name] for name, value in found.items()])

    for count in range(4):
        moved = float((let_out(count + 1) - let_out(count)).norm())
        assert moved <= MECHANISM.clip_norm * (1 + 1e-4)
    assert float((let_out(1) - let_out(0)).norm()) > 0.99 * MECHANISM.clip_norm


def test_where_nothing_stays_nothing_changes() -> None:
    part = Share(0.8, MECHANISM.clip_norm, 5)
    one, other = (PrivateSum(MECHANISM, LARGE, CPU) for _ in range(2))
    plain, none = share(one, Signs(1.0), part), other.release_share(OpenLedger(), Signs(1.0), part, frozenset({"x"}))  # type: ignore[arg-type]
    assert all(torch.equal(plain[name], none[name]) for name in LARGE)


@given(
    multiplier=st.floats(1e-6, 1e6),
    clip_norm=st.floats(1e-30, 1e30),
    sites=st.integers(1, 4096),
    size=st.floats(-1e38, 1e38),
)
def test_no_sum_over_sites_leaves_the_grid(multiplier: float, clip_norm: float, sites: int, size: float) -> None:
    part = Share(multiplier, clip_norm, sites)
    assert math.frexp(part.step)[0] == 0.5 and 2**28 <= part.std / part.step < 2**29
    assert part.most * sites <= EXACT and sites * (part.most + 2**29 * 13) < 2**53 + 2**52
    total = PrivateSum(Mechanism(1.0, clip_norm, 1.0, 1.0), {"a": torch.Size((1,))}, CPU)
    total._sums["a"] = torch.tensor([size], dtype=torch.float64)
    (units,) = share(total, Signs(1.0), part).values()
    assert abs(int(units)) <= part.most + 2**29 + 1


@pytest.mark.parametrize(
    "wrong", [(0.0, 1.0, 2), (-1.0, 1.0, 2), (math.nan, 1.0, 2), (math.inf, 1.0, 2), (1.0, 1.0, 0), (1.0, 1.0, 10**4)]
)
def test_what_is_no_share_is_refused(wrong: tuple[float, float, int]) -> None:
    with pytest.raises(ValueError, match="no share"):
        Share(*wrong)


def test_a_part_is_released_once_counted_before_and_never_without_noise() -> None:
    part = Share(1.0, MECHANISM.clip_norm, 2)
    refused = PrivateSum(MECHANISM, LARGE, CPU)
    with pytest.raises(BudgetExhausted):
        refused.release_share(RunLedger(Target(8.0, 1e-4, 10, "rdp")), SystemRandom(), part)
    total = PrivateSum(MECHANISM, LARGE, CPU)
    ledger = OpenLedger()
    assert total.release_share(ledger, SystemRandom(), part).keys() == LARGE.keys() and ledger.calls == [("take",)]
    assert total.release_share(ledger, SystemRandom(), part) == {} and total.release(ledger, SystemRandom()) == {}
    with pytest.raises(RuntimeError, match="nothing to share"):
        PrivateSum(Mechanism(0.0, 1.0, 1.0, 1.0), LARGE, CPU).release_share(ledger, SystemRandom(), part)
