"""Filters that know the noise: against transcriptions, and that their estimates are of what they say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lalora_flwr.adapter.slots import HEAD, LORA_A, LORA_B, Slot
from lalora_flwr.methods.adaptive import ADAPTIVE, WIDTHS, risk
from lalora_flwr.methods.filters import Around, Filter, State
from lalora_flwr.methods.smoothing import binomial, own_share, smooth_rows
from lalora_flwr.methods.wiener import LEAST, WIENER
from tests.reference import generator

A, B = Slot("a", "m", LORA_A, (), 1), Slot("b", "m", LORA_B, (), 0)
BIAS = Slot("bias", "head", HEAD, ())


def draws(count: int, *shape: int, seed: int = 0) -> list[Tensor]:
    source = generator(seed)
    return [torch.randn(*shape, generator=source, dtype=torch.float64) for _ in range(count)]


def wiener(gradients: Sequence[Tensor], noises: Sequence[float]) -> list[Tensor]:
    """Word by word, one component and one step at a time; components are rows."""
    signal, weight, out = [0.0] * len(gradients[0]), 0.0, []
    for gradient, noise in zip(gradients, noises, strict=True):
        weight = 0.9 * weight + 0.1
        gains = []
        for c, row in enumerate(gradient):
            signal[c] = 0.9 * signal[c] + 0.1 * (sum(float(v) ** 2 for v in row) / len(row) - noise**2)
            found = max(signal[c] / weight, 0.0)
            gains.append(max(found / (found + noise**2), 1 / 64))
        out.append(torch.stack([row * gain / max(gains) for row, gain in zip(gradient, gains, strict=True)]))
    return out


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**31), st.lists(st.floats(0.2, 3), min_size=1, max_size=6))
def test_wiener_is_its_formula_for_both_factors_and_what_is_no_factor(r: int, n: int, seed: int, noises: list[float]) -> None:
    gradients = draws(len(noises), r, n, seed=seed)
    states: list[State] = [{}, {}, {}]
    whole = wiener([g.reshape(1, -1) for g in gradients], noises)
    for g, noise, want, one in zip(gradients, noises, wiener(gradients, noises), whole, strict=True):
        around = Around(noise)
        torch.testing.assert_close(WIENER(A, g, states[0], around), want, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(WIENER(B, g.T.contiguous(), states[1], around), want.T, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(WIENER(BIAS, g, states[2], around), one.reshape(r, n), rtol=1e-9, atol=1e-12)


def test_wiener_shrinks_noise_most_the_best_component_not_at_all_and_never_amplifies() -> None:
    noise, state = 0.5, State()
    signal = torch.stack([torch.zeros(400), torch.full((400,), 0.5), torch.full((400,), 50.0)]).double()
    gains: list[Tensor] = []
    for white in draws(60, 3, 400):
        noised = signal + noise * white
        gains.append((WIENER(A, noised, state, Around(noise)) / noised).mean(1))
        assert float(gains[-1].min()) >= LEAST * (1 - 1e-12) and float(gains[-1].max()) == pytest.approx(1.0)
    nothing, half, much = torch.stack(gains[-20:]).mean(0)
    assert float(nothing) < 0.05 and float(half) == pytest.approx(0.5, abs=0.03) and float(much) == pytest.approx(1.0)
    drowned = signal[:2] / 50 + noise * draws(1, 2, 400, seed=1)[0]
    assert torch.equal(WIENER(A, drowned[:1], {}, Around(noise)), drowned[:1])  # one component is as long as without the filter


@pytest.mark.parametrize("filter", [WIENER, ADAPTIVE], ids=lambda f: f.name)
def test_without_noise_nothing_is_changed_and_a_slot_of_another_shape_begins_anew(filter: Filter) -> None:
    first, second = draws(2, 3, 8)
    state: State = {}
    assert torch.equal(filter(A, first, state, Around()), first) and not state
    filter(A, first, state, Around(0.7))
    anew = filter(A, second[:2], state, Around(0.7))
    torch.testing.assert_close(anew, filter(A, second[:2], {}, Around(0.7)))
    before = second.clone()
    filter(A, second, state, Around(0.7))
    assert torch.equal(second, before)


def matrix(features: int, width: int) -> np.ndarray:
    """The smoothing of a row as a dense matrix, by padding each unit vector."""
    columns = [np.pad(unit, width // 2, mode="symmetric") for unit in np.eye(features)]
    return np.stack([np.convolve(column, binomial(width), mode="valid") for column in columns], axis=1)


def test_adaptive_takes_the_width_of_least_estimated_error() -> None:
    """Against dense matrices, over steps whose gradient and noise change."""
    n, state, risks, chosen = 24, State(), np.zeros(len(WIDTHS)), set()
    matrices = [matrix(n, width) for width in WIDTHS]
    slow = torch.cos(torch.arange(n) / 6).double().repeat(2, 1)
    for step, white in enumerate(draws(40, 2, n)):
        noise = 0.3 + 0.05 * step
        y = ((3.0 if step < 20 else 0.2) * slow + noise * white).numpy()
        now = [sum(((S @ row - row) ** 2).sum() / noise**2 + 2 * np.trace(S) - n for row in y) for S in matrices]
        risks = 0.9 * risks + 0.1 * np.array(now)
        chosen.add(best := int(risks.argmin()))
        want = torch.from_numpy(y @ matrices[best].T / np.linalg.norm(binomial(WIDTHS[best])))
        torch.testing.assert_close(ADAPTIVE(A, torch.from_numpy(y), state, Around(noise)), want, rtol=0, atol=1e-10)
    assert len(chosen) > 2
    of_b = ADAPTIVE(B, slow.T.contiguous(), {}, Around(0.1))
    torch.testing.assert_close(of_b.T, ADAPTIVE(A, slow, {}, Around(0.1)))
    assert ADAPTIVE(BIAS, slow, {}, Around(0.1)) is slow


def test_adaptive_leaves_as_much_noise_as_there_was() -> None:
    """Widest on noise alone, whose size it keeps, within the bound that the server has for a filter."""
    state: State = {}
    (white,) = draws(1, 50, 400, seed=3)
    out = ADAPTIVE(A, white, state, Around(1.0))
    assert WIDTHS[int(state["risks"].argmin())] == 33
    assert float(out.square().mean()) == pytest.approx(1.0, rel=0.1)
    assert torch.linalg.norm(ADAPTIVE(A, torch.ones(1, 400), {}, Around(100.0))) == pytest.approx(ADAPTIVE.stretch * 20, rel=1e-5)


@pytest.mark.parametrize("width", [1, 3, 9, 33])
def test_the_risk_is_an_unbiased_estimate_of_the_error(width: int) -> None:
    n, rows, noise = 20, 3, 0.8
    truth = torch.sin(torch.arange(n) / 3).double().repeat(rows, 1)
    estimates, errors = [], []
    for white in draws(4000, rows, n, seed=width):
        y = truth + noise * white
        smoothed = smooth_rows(y, width) if width > 1 else y
        estimates.append(risk(y, smoothed, own_share(n, width), noise))
        errors.append(float((smoothed - truth).square().sum()) / noise**2)
    error_of_mean = float(np.std(np.array(estimates) - np.array(errors)) / np.sqrt(4000))
    assert float(np.mean(estimates)) == pytest.approx(float(np.mean(errors)), abs=4 * error_of_mean + 1e-9)


def test_adaptive_keeps_what_is_clear_and_smooths_what_is_not() -> None:
    def width(signal: Tensor, noise: float) -> int:
        state: State = {}
        for white in draws(30, *signal.shape):
            ADAPTIVE(A, signal + noise * white, state, Around(noise))
        return WIDTHS[int(state["risks"].argmin())]

    slow, rough = torch.sin(torch.arange(64) / 2.5).double().repeat(4, 1), draws(1, 4, 64, seed=9)[0]
    assert width(10 * rough, 0.1) == 1
    assert 3 <= width(slow, 0.5) < 33
    assert width(0 * slow, 1.0) == 33
