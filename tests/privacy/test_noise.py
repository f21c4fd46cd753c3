"""The noise of a step: its size, independence, grid and rounding."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from lalora_flwr.privacy.mechanism import Mechanism, PrivateSum, grid_step, noised_on_grid
from lalora_flwr.privacy.randomness import SeededRandom, SystemRandom
from tests.privacy.sums import CPU, LARGE, MECHANISM, SHAPES, gradients
from tests.reference import OpenLedger, Replay, generator, joint_norm


def pure_noise(source: object, mechanism: Mechanism = MECHANISM) -> dict[str, Tensor]:
    return PrivateSum(mechanism, LARGE, CPU).release(OpenLedger(), source)  # type: ignore[arg-type]


def correlation(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1])


def test_noise_of_each_tensor_is_normal_with_std_sigma_c_over_the_expected_batch() -> None:
    for tensor in pure_noise(SeededRandom(1, 0, 1)).values():
        standard = (tensor * 13.0 / (1.7 * 0.6)).flatten()  # 20,200 draws: the sample std is within 1.5 % at 3 sigma
        assert float(standard.std()) == pytest.approx(1.0, rel=0.015)
        assert abs(float(standard.mean())) < 4 / len(standard) ** 0.5
        assert kstest(standard.numpy(), "norm").pvalue > 1e-3


def test_records_with_zero_gradients_get_the_same_noise() -> None:
    total = PrivateSum(MECHANISM, LARGE, CPU)
    total.add({n: torch.zeros(9, *shape) for n, shape in LARGE.items()})
    released = total.release(OpenLedger(), SeededRandom(1, 0, 1))
    assert all(torch.equal(released[n], t) for n, t in pure_noise(SeededRandom(1, 0, 1)).items())


def test_noise_scales_with_sigma_and_c_and_shrinks_with_the_expected_batch() -> None:
    unit = pure_noise(SeededRandom(1, 0, 1), Mechanism(1.0, 1.0, 0.5, 1.0))
    for sigma, c, batch in ((2.0, 1.0, 1.0), (1.0, 3.0, 1.0), (1.0, 1.0, 4.0)):
        scaled = pure_noise(SeededRandom(1, 0, 1), Mechanism(sigma, c, 0.5, batch))
        for n in LARGE:
            torch.testing.assert_close(scaled[n], unit[n] * sigma * c / batch, rtol=1e-6, atol=2**-16 * sigma * c / batch)


def test_noise_is_independent_between_tensors_steps_rounds_and_sites() -> None:
    source = SeededRandom(1, 0, 1)
    first, second = pure_noise(source), pure_noise(source)
    other_site, other_round = pure_noise(SeededRandom(1, 1, 1)), pure_noise(SeededRandom(1, 0, 2))
    a, b = LARGE
    pairs = [(first[a], first[b]), (first[a], second[a]), (first[a], second[b])]
    pairs += [(first[n], other[n]) for other in (other_site, other_round) for n in LARGE]
    for x, y in pairs:
        assert abs(correlation(x, y)) < 5 / x.numel() ** 0.5


def test_the_divisor_is_the_expected_batch_whatever_was_sampled() -> None:
    """Tiny noise; 1, 4 and 40 equal records below C: the release grows with the records that came."""
    quiet = Mechanism(noise_multiplier=1e-9, clip_norm=1.0, sample_rate=0.25, expected_batch=8.0)
    one = gradients([[0.1, 0.1, 0.1]])
    for count in (1, 4, 40):
        total = PrivateSum(quiet, {n: torch.Size(s) for n, s in SHAPES.items()}, CPU)
        total.add({n: g.expand(count, *g.shape[1:]) for n, g in one.items()})
        released = total.release(OpenLedger(), Replay())
        for n in SHAPES:
            torch.testing.assert_close(released[n], one[n][0] * count / 8.0)


def test_an_empty_batch_releases_noise_and_is_counted() -> None:
    ledger = OpenLedger()
    released = PrivateSum(MECHANISM, LARGE, CPU).release(ledger, SeededRandom(0, 0, 1))
    assert ledger.calls == [("take",)]
    assert released.keys() == LARGE.keys()
    assert all(float(t.std()) > 0 for t in released.values())


def test_physical_batches_add_up_to_the_batch() -> None:
    per_sample = gradients([[3.0, 0.1, 2.0], [0.1, 0.1, 0.1], [math.nan, 1.0, 1.0], [9.0, 9.0, 9.0], [0.0, 0.0, 0.0]])
    shapes = {n: torch.Size(s) for n, s in SHAPES.items()}
    whole, parts = PrivateSum(MECHANISM, shapes, CPU), PrivateSum(MECHANISM, shapes, CPU)
    whole.add(per_sample)
    for rows in ([0], [1, 2], [3, 4]):
        parts.add({n: g[rows] for n, g in per_sample.items()})
    assert whole.not_finite == parts.not_finite == 1
    want, got = whole.release(OpenLedger(), Replay()), parts.release(OpenLedger(), Replay())
    for n in SHAPES:
        torch.testing.assert_close(got[n], want[n])


def test_two_neighbouring_sites_release_means_within_c_over_the_expected_batch() -> None:
    sizes = [[5.0, 1.0, 1.0], [0.1, 0.2, 0.1], [1e20, 0.0, 0.0]]
    means = []
    for rows in ([0, 1, 2], [1, 2]):
        total = PrivateSum(MECHANISM, {n: torch.Size(s) for n, s in SHAPES.items()}, CPU)
        total.add({n: g[rows] for n, g in gradients(sizes).items()})
        means.append(total.release(OpenLedger(), Replay()))
    moved = joint_norm({n: means[0][n] - means[1][n] for n in SHAPES})
    rounding = grid_step(1.7 * 0.6) * sum(math.prod(shape) for shape in SHAPES.values()) ** 0.5  # of two sums to the grid
    assert 0.9 * 0.6 / 13 < moved <= (0.6 * (1 + 1e-6) + rounding) / 13


def test_the_noise_lies_on_a_grid_of_a_power_of_two_below_its_std() -> None:
    for std in (1.02, 1e-45, 3.4e38, 2.0**-20, 0.9999, 7e-3):
        step = grid_step(std)
        assert math.frexp(step)[0] == 0.5 and 2**-18 * std < step <= 2**-17 * std
        total = torch.randn(1000, generator=generator(), dtype=torch.float64) * 30 * std
        out = noised_on_grid(total, std, SystemRandom())
        assert out.dtype == torch.float64 and torch.equal(out / step, (out / step).round())
        assert not torch.equal(total / step, (total / step).round())  # the sums themselves do not
        assert float(((out - total) / std).std()) == pytest.approx(1, abs=0.2)


class Fixed:
    """A source whose first draw is given and whose second, fine one is too."""

    seeded = True

    def __init__(self, *draws: Tensor) -> None:
        self._draws = list(draws)

    def normal(self, shape: torch.Size) -> Tensor:
        return self._draws.pop(0)


def test_rounding_is_that_of_exact_arithmetic() -> None:
    """Against rational arithmetic: the sum of total, noise and fine noise, rounded once, half up."""
    from fractions import Fraction

    draw, std = generator(5), 1.37
    total, first, second = (torch.randn(400, generator=draw, dtype=torch.float64) for _ in range(3))
    total[:20] = (total[:20] * 1e3 / grid_step(std)).floor() * grid_step(std)  # some on the grid, with no fraction
    step = Fraction(grid_step(std))
    noise, fine = first * (std / grid_step(std)), second * (std / grid_step(std) * 2.0**-40)
    out = noised_on_grid(total, std, Fixed(first, second))  # type: ignore[arg-type]
    for x, n, f, y in zip(total.tolist(), noise.tolist(), fine.tolist(), out.tolist(), strict=True):
        want = (Fraction(x) / step + Fraction(n) + Fraction(f) + Fraction(1, 2)).__floor__()
        assert Fraction(y) / step == want


def test_the_fine_draw_decides_at_a_rounding_boundary() -> None:
    step, half = grid_step(1.0), torch.tensor([0.5], dtype=torch.float64)
    for second, want in ((1.0, step), (-1.0, 0.0)):
        source = Fixed(torch.zeros(1, dtype=torch.float64), torch.tensor([second], dtype=torch.float64))
        assert noised_on_grid(half * step, 1.0, source).item() == want  # type: ignore[arg-type]


def test_rounded_gaussians_have_the_probabilities_of_the_lemma() -> None:
    """On a grid as coarse as its noise, where the rounding shows: P(k) is the normal probability of [k - ½, k + ½)."""
    draw = SystemRandom()
    for centre in (0.0, 0.3, 0.5):
        x = torch.full((200_000,), centre, dtype=torch.float64)
        step = grid_step(1.0)
        out = noised_on_grid(x * step, 1.0, draw) / step  # σ is 2^17 grid units: compare it in bins of 2^16
        bins = torch.bucketize(out, torch.arange(-3, 4, dtype=torch.float64) * 2**16 - 0.5)
        edges = torch.tensor([-math.inf, *(b * 2.0**16 - 0.5 - centre for b in range(-3, 4)), math.inf]) / 2.0**17
        want = torch.diff(torch.special.ndtr(edges.double()))
        found = torch.bincount(bins, minlength=8) / len(x)
        assert float((found - want).abs().max()) < 7 * 0.5 / len(x) ** 0.5


def test_a_sum_beyond_what_float64_holds_on_the_grid_is_limited() -> None:
    std = 1e-9
    out = noised_on_grid(torch.tensor([1e30, -1e30, math.inf], dtype=torch.float64), std, SystemRandom())
    assert out.isfinite().all() and (out / grid_step(std)).abs().max() <= 2**52 + 2**22
