"""FedSVD and FedASK against the dense product and its singular value decomposition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lalora_flwr.engines.inline import run_inline
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.fedsvd import factors_of, turned
from tests.conftest import MODELS, Finished, arrays_of, small
from tests.server.federations import mean_of
from tests.server.test_resume import killed_after, result, resumed


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 10**6), st.booleans())
def test_the_product_stays_and_the_factors_are_those_of_its_svd(
    rank: int, m: int, n: int, split: bool, seed: int, zero: bool
) -> None:
    draw = np.random.default_rng(seed)
    A, B = draw.normal(size=(rank, n)), np.zeros((m, rank)) if zero else draw.normal(size=(m, rank))
    new_A, new_B = turned(A, B, split=split)
    assert new_A.shape == A.shape and new_B.shape == B.shape
    np.testing.assert_allclose(new_B @ new_A, B @ A, atol=1e-9)
    values = np.linalg.svd(B @ A, compute_uv=False)[:rank]
    squares = np.sort(np.diag(new_B.T @ new_B))[::-1][: len(values)]
    np.testing.assert_allclose(squares, values if split else values**2, atol=1e-7)
    rows = new_A @ new_A.T
    kept = np.diag(rows) > 1e-12
    if not split:
        np.testing.assert_allclose(rows, np.diag(kept.astype(float)), atol=1e-9)
        assert kept.sum() == min(rank, m, n)


@pytest.mark.parametrize(("strategy", "split"), [("fedsvd", False), ("fedask", True)])
def test_a_round_is_the_mean_of_b_times_a_turned(strategy: str, split: bool, finished: Callable[..., Finished]) -> None:
    done = finished(strategy=strategy)
    first, second = done.spy.training(1), done.spy.training(2)
    start, sent, mean = arrays_of(first[0][0]), arrays_of(second[0][0]), mean_of(first)
    layout = MODELS.learner(done.settings).adapter.layout
    pairs = list(factors_of(layout))
    assert pairs
    for name_A, name_B in pairs:
        assert set(arrays_of(first[0][1])) >= {name_B} and name_A not in arrays_of(first[0][1])
        product = mean[name_B].double().numpy() @ start[name_A].double().numpy()
        S = np.linalg.svd(product, compute_uv=False)
        rank = len(start[name_A])
        size = max(float(np.abs(product).max()), 1e-6)
        new = sent[name_B].double().numpy() @ sent[name_A].double().numpy()
        np.testing.assert_allclose(new, product, atol=1e-5 * size)
        lengths = np.linalg.norm(sent[name_A].double().numpy(), axis=1)
        np.testing.assert_allclose(lengths, np.sqrt(S[:rank]) if split else np.ones(rank), rtol=1e-4)


def test_it_goes_on_after_a_death(tmp_path: Path, finished: Callable[..., Finished]) -> None:
    killed_after(small(tmp_path, strategy="fedsvd", num_rounds=3), 2)
    run_inline(resumed(tmp_path, strategy="fedsvd", num_rounds=3))
    assert result(tmp_path / "run") == result(finished(strategy="fedsvd", num_rounds=3).path)


def test_it_is_refused_where_sites_send_gradients() -> None:
    with pytest.raises(ConfigError, match="combines adapters, and no gradients"):
        small(Path("x"), strategy="fedsvd", trust="secure-sum", train__local_steps=1)
