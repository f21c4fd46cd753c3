from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor

from lalora_flwr.ground.errors import BudgetExhausted
from lalora_flwr.privacy.counting import RunLedger
from lalora_flwr.privacy.events import Target
from lalora_flwr.privacy.mechanism import LARGEST, SMALLEST, Mechanism, PrivateSum, clip, grid_step, noised_on_grid
from lalora_flwr.privacy.randomness import SeededRandom, SystemRandom
from tests.reference import OpenLedger, Replay, generator, joint_norm

SHAPES = {"x.lora_A.w": (2, 7), "x.lora_B.w": (5, 2), "head.bias": (3,)}
CPU = torch.device("cpu")
SIZES = [0.0, 1e-42, 1e-30, 1e-12, 1e-3, 0.999, 1.0, 7.0, 1e6, 1e18, 1e25, 1e38, math.inf, -math.inf, math.nan]
BOUNDS = st.floats(SMALLEST, LARGEST, width=32)  # every C that float32 can hold


def gradients(sizes: list[list[float]], seed: int = 0) -> dict[str, Tensor]:
    """One record a row of ``sizes``, one size a tensor; an infinite or NaN size spoils one element."""
    draw, out = generator(seed), {}
    for t, (name, shape) in enumerate(SHAPES.items()):
        rows = []
        for row in sizes:
            g = torch.randn(shape, generator=draw)
            if math.isfinite(row[t]):
                rows.append((g / g.norm()).double().mul(row[t]).float())
            else:
                g.view(-1)[-1] = row[t]
                rows.append(g)
        out[name] = torch.stack(rows) if rows else torch.zeros(0, *shape)
    return out


def record(per_sample: Mapping[str, Tensor], j: int) -> dict[str, Tensor]:
    return {name: g[j : j + 1] for name, g in per_sample.items()}


SIZE_ROWS = st.lists(st.lists(st.sampled_from(SIZES), min_size=3, max_size=3), max_size=6)


@settings(max_examples=150, deadline=None)
@given(SIZE_ROWS, BOUNDS, st.integers(0, 2**31))
def test_no_record_contributes_more_than_c_over_all_tensors(sizes: list[list[float]], bound: float, seed: int) -> None:
    per_sample = gradients(sizes, seed)
    for j in range(len(sizes)):
        alone, _ = clip(record(per_sample, j), bound)
        assert all(t.isfinite().all() for t in alone.values())
        assert largest_over(alone, bound) <= 1 + 1e-9


@settings(max_examples=150, deadline=None)
@given(SIZE_ROWS.filter(bool), BOUNDS, st.integers(0, 2**31), st.data())
def test_neighbours_differ_by_at_most_c(sizes: list[list[float]], bound: float, seed: int, data: st.DataObject) -> None:
    per_sample = gradients(sizes, seed)
    gone = data.draw(st.integers(0, len(sizes) - 1))
    rest = {name: torch.cat([g[:gone], g[gone + 1 :]]) for name, g in per_sample.items()}
    with_it, without_it = clip(per_sample, bound)[0], clip(rest, bound)[0]
    assert largest_over({n: with_it[n] - without_it[n] for n in SHAPES}, bound) <= 1 + 1e-9


@settings(max_examples=100, deadline=None)
@given(SIZE_ROWS, BOUNDS, st.integers(0, 2**31))
def test_the_sum_is_that_of_the_records_one_by_one(sizes: list[list[float]], bound: float, seed: int) -> None:
    per_sample = gradients(sizes, seed)
    sums, not_finite = clip(per_sample, bound)
    want = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    expected_bad = 0
    for j in range(len(sizes)):
        one = record(per_sample, j)
        norm = joint_norm(one)
        if not math.isfinite(norm):
            expected_bad += 1
            continue
        for name in SHAPES:
            want[name] += one[name][0].double() * min(1.0, bound / norm if norm else 1.0)
    assert not_finite == expected_bad
    for name in SHAPES:
        assert sums[name].shape == SHAPES[name] and sums[name].dtype == torch.float64
        torch.testing.assert_close(sums[name], want[name], rtol=1e-9, atol=1e-9 * bound)


def test_a_large_gradient_keeps_the_bound() -> None:
    """More entries than are float64 at once."""
    g = {"x": torch.randn(2, 3_000_000, generator=generator()).abs()}
    assert joint_norm(clip(record(g, 0), 1.0)[0]) == pytest.approx(1, abs=1e-9)
    both, alone = clip(g, 1.0)[0], [clip(record(g, j), 1.0)[0]["x"] for j in (0, 1)]
    torch.testing.assert_close(both["x"], alone[0] + alone[1])


SCALES = [1e-45, 1e-42, 1e-38, 1e-30, 2.6e-23, 1e-20, 1e-12, 1e-6, 1.0, 1e6, 1e12, 1e19, 1e25, 1e38]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tensors", [1, 40])
def test_the_bound_holds_at_every_scale_of_c_and_of_the_gradients(dtype: torch.dtype, tensors: int) -> None:
    """C from the smallest to the largest float32, entries from 1e-45 to 1e38: in float32 squares below 2.6e-23 vanished."""
    for scale in SCALES:
        g = {str(i): (torch.randn(3, 50, generator=generator(i)).double() * scale).to(dtype) for i in range(tensors)}
        size = joint_norm(record(g, 0))
        for bound in [SMALLEST, *SCALES, LARGEST]:
            alone, dropped = clip(record(g, 0), bound)
            moved = largest_over(alone, bound)
            assert moved <= 1 + 1e-9, (scale, bound)
            if math.isfinite(size) and not dropped:  # and it is no smaller than it should be
                assert moved == pytest.approx(min(1.0, size / bound), rel=1e-9)


def largest_over(tensors: Mapping[str, Tensor], bound: float) -> float:
    """The joint norm in units of ``bound``; divided first, since the square of a tiny C is no float64."""
    return joint_norm({n: t.double() / bound for n, t in tensors.items()})


def test_a_norm_that_underflows_lets_nothing_through() -> None:
    """Only float64 gradients can be so small; with a factor of 1 they would pass without a clip."""
    tiny = {"x": torch.full((1, 9), 1e-170, dtype=torch.float64)}
    assert not clip(tiny, 1.0)[0]["x"].any()


def test_a_record_below_c_is_unchanged() -> None:
    per_sample = gradients([[0.3, 0.2, 0.1]])
    sums, not_finite = clip(per_sample, 1.0)
    assert all(torch.equal(sums[n], per_sample[n][0]) for n in SHAPES)
    assert not_finite == 0


def test_a_record_above_c_keeps_its_direction_and_gets_norm_c() -> None:
    per_sample = gradients([[3.0, 4.0, 12.0]])  # joint norm 13
    sums, _ = clip(per_sample, 1.3)
    for n in SHAPES:
        torch.testing.assert_close(sums[n], per_sample[n][0].double() / 10, rtol=1e-6, atol=0)


def test_clip_is_per_record_not_per_batch() -> None:
    """Ten equal records of norm 1 sum to norm 10 at C = 1; two opposite ones of norm 5 cancel, however large."""
    one = gradients([[1.0, 0.0, 0.0]])
    ten = {n: g.expand(10, *g.shape[1:]) for n, g in one.items()}
    assert joint_norm(clip(ten, 1.0)[0]) == pytest.approx(10.0, rel=1e-5)
    loud = {n: torch.cat([5 * g, -0.1 * g]) for n, g in one.items()}  # batch sum has norm 4.9, clipped sum 1 - 0.1
    assert joint_norm(clip(loud, 1.0)[0]) == pytest.approx(0.9, rel=1e-5)


def test_clip_is_joint_not_per_tensor() -> None:
    """Three tensors of norm 1 each: a clip by tensor would let √3 through."""
    sums, _ = clip(gradients([[1.0, 1.0, 1.0]]), 1.0)
    assert joint_norm(sums) == pytest.approx(1.0, rel=1e-6)
    for t in sums.values():
        assert joint_norm({"t": t}) == pytest.approx(3**-0.5, rel=1e-5)


@pytest.mark.parametrize("size", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tensor", range(3))
def test_a_record_that_is_not_finite_in_any_tensor_adds_zero_and_is_counted(size: float, tensor: int) -> None:
    bad = [0.1, 0.1, 0.1]
    bad[tensor] = size
    good = gradients([[0.2, 0.2, 0.2], bad, [0.3, 0.1, 0.1]])
    sums, not_finite = clip(good, 1.0)
    want, _ = clip({n: g[[0, 2]] for n, g in good.items()}, 1.0)
    assert not_finite == 1
    for n in SHAPES:
        torch.testing.assert_close(sums[n], want[n])
    assert not clip(record(good, 1), 1.0)[0]["head.bias"].any()


def test_zero_gradients_and_no_records_sum_to_zero() -> None:
    for per_sample in (gradients([[0.0, 0.0, 0.0]] * 4), gradients([])):
        sums, not_finite = clip(per_sample, 1.0)
        assert not_finite == 0
        assert {n: tuple(t.shape) for n, t in sums.items()} == SHAPES
        assert not any(t.any() for t in sums.values())


def test_without_a_bound_only_records_that_are_not_finite_are_dropped() -> None:
    per_sample = gradients([[1e6, 1.0, 1.0], [math.nan, 1.0, 1.0], [0.0, 0.0, 0.0]])
    sums, not_finite = clip(per_sample, math.inf)
    assert not_finite == 1
    for n in SHAPES:
        assert torch.equal(sums[n], per_sample[n][0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_float_types_are_summed_in_float64_within_c(dtype: torch.dtype) -> None:
    per_sample = {n: g.to(dtype) for n, g in gradients([[300.0, 40.0, 5.0]]).items()}
    sums, _ = clip(per_sample, 1.0)
    assert all(t.dtype == torch.float64 for t in sums.values())
    assert joint_norm(sums) == pytest.approx(1.0, rel=1e-9)


MECHANISM = Mechanism(noise_multiplier=1.7, clip_norm=0.6, sample_rate=0.25, expected_batch=13.0)
LARGE = {"x.lora_A.w": torch.Size((200, 101)), "x.lora_B.w": torch.Size((101, 200))}


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


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip_norm": 0.0},
        {"clip_norm": 1e-46},
        {"clip_norm": math.inf},
        {"clip_norm": math.nan},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": 1e-12},
        {"sample_rate": 0.0},
        {"sample_rate": 1.1},
        {"expected_batch": 0.0},
        {"expected_batch": math.inf},
    ],
    ids=str,
)
def test_constants_that_are_none_of_a_mechanism_are_refused(wrong: dict[str, float]) -> None:
    good = {"noise_multiplier": 1.0, "clip_norm": 1.0, "sample_rate": 0.5, "expected_batch": 2.0}
    with pytest.raises(ValueError, match="no constants"):
        Mechanism(**{**good, **wrong})


class Watched(Replay):
    """Notes when it is asked for noise."""

    def __init__(self, calls: list[tuple[object, ...]]) -> None:
        super().__init__()
        self.calls = calls

    def normal(self, shape: object) -> Tensor:
        self.calls.append(("noise",))
        return super().normal(shape)  # type: ignore[arg-type]


def test_the_ledger_counts_the_step_before_any_noise_is_drawn() -> None:
    ledger = OpenLedger()
    PrivateSum(MECHANISM, LARGE, CPU).release(ledger, Watched(ledger.calls))
    assert ledger.calls == [("take",), *[("noise",)] * 4]  # two draws a tensor


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_if_the_ledger_refuses_nothing_is_released(sigma: float) -> None:
    calls: list[tuple[object, ...]] = []
    total = PrivateSum(Mechanism(sigma, 1.0, 0.5, 2.0), LARGE, CPU)
    total.add({n: torch.ones(2, *shape) for n, shape in LARGE.items()})
    with pytest.raises(BudgetExhausted):
        total.release(RunLedger(Target(8.0, 1e-4, 10, "rdp")), Watched(calls))  # no step was reserved
    assert calls == []


def test_a_sum_is_released_only_once() -> None:
    """Two releases of one sum would average half the noise away."""
    total = PrivateSum(MECHANISM, LARGE, CPU)
    total.add({n: torch.ones(2, *shape) for n, shape in LARGE.items()})
    total.release(OpenLedger(), Replay())
    assert total.release(OpenLedger(), Replay(1)) == {}


def _holds_tensor(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(_holds_tensor, value)))


def test_no_public_attribute_or_return_value_holds_the_sum_without_noise() -> None:
    total = PrivateSum(MECHANISM, LARGE, CPU)
    assert total.add({n: torch.ones(2, *shape) for n, shape in LARGE.items()}) is None
    for _ in range(2):  # before and after the release
        public = [name for name in dir(total) if not name.startswith("_")]
        assert set(public) == {"add", "release", "not_finite"}
        assert not any(_holds_tensor(getattr(total, name)) for name in public)
        total.release(OpenLedger(), Replay())


@pytest.mark.parametrize("change", ["missing", "extra", "other"])
def test_gradients_of_other_tensors_than_the_steps_are_refused(change: str) -> None:
    per_sample = {n: torch.ones(2, *shape) for n, shape in LARGE.items()}
    if change != "extra":
        del per_sample["x.lora_B.w"]
    if change != "missing":
        per_sample["y.lora_B.w"] = torch.ones(2, 101, 200)
    with pytest.raises(RuntimeError):
        PrivateSum(MECHANISM, LARGE, CPU).add(per_sample)


def test_without_privacy_the_release_is_the_plain_sum_over_the_expected_batch() -> None:
    mechanism = Mechanism(noise_multiplier=0.0, clip_norm=0.1, sample_rate=1.0, expected_batch=4.0)
    assert not mechanism.private and MECHANISM.private
    per_sample = gradients([[5.0, 2.0, 1.0], [0.1, 0.1, 0.1], [math.nan, 0.0, 0.0]])
    total = PrivateSum(mechanism, {n: torch.Size(s) for n, s in SHAPES.items()}, CPU)
    total.add(per_sample)
    ledger = OpenLedger()
    released = total.release(ledger, Replay())
    assert ledger.taken == 1 and total.not_finite == 1
    for n in SHAPES:
        torch.testing.assert_close(released[n], per_sample[n][:2].sum(0) / 4.0)
