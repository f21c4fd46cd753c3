"""Filters over the steps: DOPPLER and DiSK against their recursions, and what their memory is of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lalora_flwr.adapter.slots import LORA_A, Slot
from lalora_flwr.engines.inline import run_inline
from lalora_flwr.methods.filters import Around, State, filter_of
from tests.conftest import Finished, small
from tests.reference import generator
from tests.server.test_resume import killed_after, result, resumed

A = Slot("a", "m", LORA_A, (), 1)
NAMES = pytest.mark.parametrize("name", ["doppler", "doppler:0.5", "disk", "disk:0.3"])


def gradients(steps: int, *shape: int, seed: int = 0) -> list[Tensor]:
    source = generator(seed)
    return [torch.randn(*shape, generator=source, dtype=torch.float64) for _ in range(steps)]


def filtered(name: str, given: Sequence[Tensor]) -> list[Tensor]:
    filter, state = filter_of(name), State()
    return [filter(A, g, state, Around(0.3)).clone() for g in given]


def doppler(beta: float, given: Sequence[Tensor]) -> list[Tensor]:
    """m_t = Σ b_τ g_{t-τ} - Σ a_τ m_{t-τ}, b = (1 - β)/2 (1, 1), a = -β, over the same of ones, with all of the past at hand."""
    b, a = [(1 - beta) / 2, (1 - beta) / 2], [-beta]
    m: list[Tensor] = []
    c: list[float] = []
    for t in range(len(given)):
        m.append(
            sum((b[k] * given[t - k] for k in range(2) if t >= k), torch.zeros_like(given[0]))
            - sum((a[k - 1] * m[t - k] for k in range(1, 2) if t >= k), torch.zeros_like(given[0]))
        )
        c.append(sum(b[k] for k in range(2) if t >= k) - sum(a[k - 1] * c[t - k] for k in range(1, 2) if t >= k))
    return [one / share for one, share in zip(m, c, strict=True)]


@given(st.integers(1, 12), st.sampled_from([0.1, 0.5, 0.9, 0.99]), st.integers(0, 2**31))
def test_doppler_is_its_recursion(steps: int, beta: float, seed: int) -> None:
    seen = gradients(steps, 2, 3, seed=seed)
    for got, want in zip(filtered(f"doppler:{beta}", seen), doppler(beta, seen), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@given(st.integers(1, 12), st.sampled_from([0.1, 0.7, 0.9]), st.integers(0, 2**31))
def test_disk_is_its_average(steps: int, kappa: float, seed: int) -> None:
    seen = gradients(steps, 2, 3, seed=seed)
    for t, got in enumerate(filtered(f"disk:{kappa}", seen)):
        weights = [(1 - kappa) ** t] + [kappa * (1 - kappa) ** (t - k) for k in range(1, t + 1)]
        weights[0] = (1 - kappa) ** t  # of g_0, which is where the average begins
        torch.testing.assert_close(
            got, sum((w * g for w, g in zip(weights, seen, strict=False)), torch.zeros(2, 3)), check_dtype=False
        )


@NAMES
def test_constants_pass_and_it_is_linear(name: str) -> None:
    constant = [torch.full((2, 3), 2.5, dtype=torch.float64)] * 8
    for got in filtered(name, constant):
        torch.testing.assert_close(got, constant[0])
    one, two = gradients(8, 2, 3), gradients(8, 2, 3, seed=1)
    mixed = filtered(name, [2 * x - 3 * y for x, y in zip(one, two, strict=True)])
    for got, x, y in zip(mixed, filtered(name, one), filtered(name, two), strict=True):
        torch.testing.assert_close(got, 2 * x - 3 * y)


@pytest.mark.parametrize(("name", "left"), [("doppler:0.8", 0.1), ("disk:0.3", 0.3 / 1.7)])
def test_noise_is_less_in_a_step_and_as_much_in_a_walk(name: str, left: float) -> None:
    seen = gradients(400, 4000, seed=2)
    out = filtered(name, seen)
    assert float(out[-1].var()) == pytest.approx(left, rel=0.1)
    walk, plain = torch.stack(out).sum(0).var(), torch.stack(seen).sum(0).var()
    assert float(walk / plain) == pytest.approx(filter_of(name).keeps, rel=0.05)


@NAMES
def test_what_is_given_stays_and_what_is_returned_is_nobody_elses(name: str) -> None:
    filter, state = filter_of(name), State()
    for g in gradients(4, 2, 3):
        before = g.clone()
        out = filter(A, g, state, Around())
        kept = {key: value.clone() for key, value in state.items()}
        out += 7.0  # as an optimizer may
        assert torch.equal(g, before) and all(torch.equal(state[key], value) for key, value in kept.items())
    anew = gradients(1, 5, 2, seed=3)[0]
    torch.testing.assert_close(filter(A, anew, state, Around()), anew)  # of another shape: the first of its kind


def test_the_published_one_gradient_form_of_disk_is_an_average_of_plain_sgd() -> None:
    """Kalman prediction and correction with γ = (1 - κ)/κ on a quadratic, word by word, against SGD and a running average."""
    kappa, rate, source = 0.7, 0.1, np.random.default_rng(0)
    gamma, H = (1 - kappa) / kappa, np.diag([1.0, 3.0, 0.5])
    x = plain = average = source.normal(size=3)
    moved = m = np.zeros(3)
    for _ in range(30):
        noise = source.normal(size=3)
        m = (1 - kappa) * m + kappa * (H @ (x + gamma * moved) + noise)
        moved, x = -rate * m, x - rate * m
        plain = plain - rate * (H @ plain + noise)
        average = (1 - kappa) * average + kappa * plain
        np.testing.assert_allclose(plain, x + gamma * moved, atol=1e-12)
        np.testing.assert_allclose(average, x, atol=1e-12)


SITES, SERVER = {"train__local_steps": 3}, {"train__local_steps": 1, "train__step_at": "server"}


@pytest.mark.parametrize(("name", "where"), [("doppler", SERVER), ("wiener", SITES)])
def test_a_resumed_run_remembers(name: str, where: dict[str, Any], tmp_path: Path, finished: Callable[..., Finished]) -> None:
    keys: dict[str, Any] = {"num_rounds": 3, **where, "filter__name": name}
    killed_after(small(tmp_path, **keys), 2)
    assert result(run_inline(resumed(tmp_path, **keys))) == result(finished(**keys).path)
