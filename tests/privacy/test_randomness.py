"""Draws of noise and of samples: their distribution, their source, and what repeats for a seed."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from scipy.stats import binom, chisquare, kstest

from lalora_flwr.ground.seeds import derive_seed
from lalora_flwr.privacy import randomness
from lalora_flwr.privacy.randomness import RandomSource, SeededRandom, SystemRandom, poisson_sample

N = torch.Size((400_000,))
NEVER = 1e-9  # a p-value that draws from the operating system fall below once in a thousand million runs


def seed_everything() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def test_draws_of_the_system_ignore_every_seed_and_never_repeat() -> None:
    draws = []
    for _ in range(2):
        seed_everything()
        source = SystemRandom()
        draws += [source.normal(torch.Size((8,))), source.normal(torch.Size((8,)))]
        draws += [source.uniform(8).float(), source.uniform(8).float()]
    assert len({tuple(d.tolist()) for d in draws}) == len(draws)


def test_draws_leave_the_global_generators_alone() -> None:
    seed_everything()
    want = torch.rand(4), random.random(), np.random.rand()
    seed_everything()
    for source in (SystemRandom(), SeededRandom(0, 0, 1)):
        source.normal(torch.Size((5,)))
        source.uniform(5)
    assert torch.equal(torch.rand(4), want[0])
    assert (random.random(), np.random.rand()) == want[1:]


def test_only_the_simulations_source_says_seeded() -> None:
    assert SystemRandom().seeded is False
    assert SeededRandom(0, 0, 1).seeded is True


@pytest.mark.parametrize("source", [SystemRandom(), SeededRandom(3, 1, 2)], ids=["system", "seeded"])
def test_normal_draws_are_standard_normal_and_independent(source: RandomSource) -> None:
    x, y = source.normal(N).double(), source.normal(N).double()
    for z in (x, y):
        assert kstest(z.numpy(), "norm").pvalue > NEVER
        assert abs(float(z.square().mean()) - 1) < 7 * (2 / len(z)) ** 0.5
        assert float(z.abs().max()) < 8
    half = len(x) // 2
    for a, b in ((x, y), (x[:half], x[half:]), (x[:-1], x[1:]), (x[:half].abs(), x[half:].abs())):
        assert abs(np.corrcoef(a.numpy(), b.numpy())[0, 1]) < 7 / len(a) ** 0.5


@pytest.mark.parametrize("source", [SystemRandom(), SeededRandom(3, 1, 2)], ids=["system", "seeded"])
def test_uniform_draws_are_uniform_on_zero_to_one(source: RandomSource) -> None:
    u = source.uniform(20_000)
    assert u.dtype == torch.float64
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert kstest(u.numpy(), "uniform").pvalue > NEVER
    assert abs(np.corrcoef(u[:-1].numpy(), u[1:].numpy())[0, 1]) < 7 / len(u) ** 0.5
    assert len(u.unique()) == len(u)


@pytest.mark.parametrize("source", [SystemRandom(), SeededRandom(3, 1, 2)], ids=["system", "seeded"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2,), (3,), (5, 7), (2, 3, 4), (3, 0)])
def test_any_shape(source: RandomSource, shape: tuple[int, ...]) -> None:
    x = source.normal(torch.Size(shape))
    assert x.shape == shape and x.dtype == torch.float64 and x.isfinite().all()
    assert len(x.unique()) == x.numel()
    assert source.uniform(x.numel()).shape == (x.numel(),)


def test_seeds_that_differ_only_above_32_bits_give_other_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's generator on the CPU takes the low 32 bits of a seed: 2^32 streams meet after some 65,000."""
    drawn = []
    for high in range(1, 4):
        monkeypatch.setattr(randomness, "derive_seed", lambda *_, high=high: (high << 32) | 7)
        source = SeededRandom(0, 0, 1)
        drawn.append((*source.uniform(3).tolist(), *source.normal(torch.Size((3,))).tolist()))
    assert len({*drawn}) == 3


def test_the_tail_has_no_end_at_eight_standard_deviations() -> None:
    """53 bits end at 8.57; the largest draw of 106 bits lies at 12.12."""
    assert float(SystemRandom(lambda n: b"\xff" * n).normal(torch.Size((1,)))) == pytest.approx(math.sqrt(2 * 106 * math.log(2)))


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_the_extremes_of_the_generator_stay_finite_and_below_one(byte: bytes) -> None:
    source = SystemRandom(lambda n: byte * n)
    assert source.normal(torch.Size((3,))).isfinite().all()
    assert 0 <= float(source.uniform(1)) < 1


def test_uniform_draws_hold_53_random_bits() -> None:
    scaled = SystemRandom().uniform(4000) * 2.0**53
    assert torch.equal(scaled, scaled.round())
    odd = float((scaled.to(torch.int64) % 2).double().mean())
    assert abs(odd - 0.5) < 7 * 0.5 / 4000**0.5


def test_seeded_draws_repeat_for_the_same_seed_site_and_round_only() -> None:
    def draws(seed: int, site: int, server_round: int) -> tuple[float, ...]:
        source = SeededRandom(seed, site, server_round)
        return (*source.uniform(4).tolist(), *source.normal(torch.Size((4,))).tolist())

    keys = [(s, i, t) for s in (0, 1, 11) for i in (0, 1, 11) for t in (1, 2, 11)]
    assert all(draws(*key) == draws(*key) for key in keys)
    assert len({draws(*key) for key in keys}) == len(keys)
    assert len({draws(*key)[:4] for key in keys}) == len({draws(*key)[4:] for key in keys}) == len(keys)


def test_seeded_draws_in_a_row_are_those_of_one_call_after_the_other() -> None:
    row, single = SeededRandom(1, 2, 3).normal_in_a_row(17), SeededRandom(1, 2, 3)
    assert torch.equal(row, torch.cat([single.normal(torch.Size(shape)).flatten() for shape in ((3, 2), (1,), (2, 5))]))


def test_seeded_noise_does_not_depend_on_how_much_was_sampled() -> None:
    short, long = SeededRandom(0, 0, 1), SeededRandom(0, 0, 1)
    short.uniform(1)
    long.uniform(1000)
    assert torch.equal(short.normal(torch.Size((9,))), long.normal(torch.Size((9,))))


def test_derived_seeds_differ_by_seed_purpose_and_number() -> None:
    keys = [(s, p, n) for s in range(4) for p in ("noise", "sampling", "adapter") for n in range(4)]
    seeds = [derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= s < 2**64 for s in seeds) and any(s >= 2**63 for s in seeds)
    assert derive_seed(0, "noise", 1) == derive_seed(0, "noise", 1)
    assert derive_seed(0, "noise", 1, 12) != derive_seed(0, "noise", 11, 2)


def test_size_of_a_sample_is_binomial() -> None:
    source, records, q, draws = SeededRandom(0, 0, 1), 40, 0.15, 4000
    sizes = np.array([len(poisson_sample(source, records, q)) for _ in range(draws)])
    counts = np.bincount(sizes, minlength=records + 1)
    expected = binom.pmf(np.arange(records + 1), records, q) * draws
    common = expected > 5
    pooled = [np.append(x[common], x[~common].sum()) for x in (counts, expected)]
    assert chisquare(*pooled).pvalue > 1e-3


def test_records_join_independently_each_with_the_same_probability() -> None:
    source, records, q, draws = SeededRandom(0, 0, 1), 12, 0.3, 5000
    joined = np.zeros((draws, records))
    for i in range(draws):
        joined[i, poisson_sample(source, records, q).numpy()] = 1
    assert np.abs(joined.mean(0) - q).max() < 5 * (q * (1 - q) / draws) ** 0.5
    between_records = np.corrcoef(joined.T) - np.eye(records)
    assert np.abs(between_records).max() < 5 / draws**0.5
    between_steps = [np.corrcoef(joined[:-1, j], joined[1:, j])[0, 1] for j in range(records)]
    assert np.abs(between_steps).max() < 5 / draws**0.5


@pytest.mark.parametrize("source", [SystemRandom(), SeededRandom(0, 0, 1)], ids=["system", "seeded"])
def test_rate_one_takes_every_record_once_and_rate_zero_none(source: RandomSource) -> None:
    for _ in range(50):
        assert torch.equal(poisson_sample(source, 30, 1.0), torch.arange(30))
        assert len(poisson_sample(source, 30, 0.0)) == 0
    assert len(poisson_sample(source, 0, 0.5)) == 0


class Steps:
    """Draws that lie on a grid."""

    seeded = True

    def uniform(self, n: int) -> torch.Tensor:
        return torch.arange(n, dtype=torch.float64) / n

    def normal(self, shape: torch.Size) -> torch.Tensor:
        raise AssertionError("sampling takes no normal draw")


def test_a_record_joins_if_its_draw_lies_below_the_rate() -> None:
    assert poisson_sample(Steps(), 4, 0.5).tolist() == [0, 1]  # draws 0, 1/4, 1/2, 3/4
    assert poisson_sample(Steps(), 4, 0.51).tolist() == [0, 1, 2]
    assert poisson_sample(Steps(), 4, 0.0).tolist() == []


def test_a_sample_may_be_empty_and_holds_no_record_twice() -> None:
    source = SeededRandom(0, 0, 1)
    samples = [poisson_sample(source, 20, 0.05) for _ in range(200)]
    assert 0.25 < sum(len(s) == 0 for s in samples) / 200 < 0.47  # 0.95^20 = 0.36
    for sample in samples:
        assert len(sample.unique()) == len(sample)
        assert sample.dtype == torch.int64 and (sample < 20).all()
