"""FedRot-LoRA: the sites' factors, turned by the orthogonal Procrustes solution, and their mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes

from lalora_flwr.adapter.slots import LORA_A, LORA_B, Layout, Slot, factors_of
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.fedrot import METHOD, rotation
from lalora_flwr.methods.merges import Memory, Now
from lalora_flwr.methods.updates import Update, together
from lalora_flwr.settings.schema import MergeSettings
from tests.conftest import MODELS, Finished, arrays_of, small

LAYOUT = Layout([Slot("a", "x", LORA_A, (2, 5), 1), Slot("b", "x", LORA_B, (4, 2), 0), Slot("h", "head", "head", (3,))])


@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 8), st.booleans(), st.integers(0, 10**6))
def test_the_rotation_is_the_procrustes_solution_of_both_factors(rank: int, m: int, n: int, zero: bool, seed: int) -> None:
    draw = np.random.default_rng(seed)
    A, to_A, B, to_B = (draw.normal(size=shape) for shape in ((rank, n), (rank, n), (m, rank), (m, rank)))
    to_B = np.zeros_like(to_B) if zero else to_B
    R = rotation(A, B, to_A, to_B)
    np.testing.assert_allclose(R @ R.T, np.eye(rank), atol=1e-9)
    stacked, target = np.vstack([A.T, B]), np.vstack([to_A.T, to_B])
    best, _ = orthogonal_procrustes(stacked, target)
    assert np.linalg.norm(stacked @ R - target) <= np.linalg.norm(stacked @ best - target) + 1e-9


def test_sites_that_turned_the_same_factors_differently_average_to_them() -> None:
    """The mean of the factors would be another model, which is what the method is for."""
    draw = np.random.default_rng(0)
    current = {"a": draw.normal(size=(2, 5)), "b": draw.normal(size=(4, 2)), "h": np.zeros(3)}
    updates = []
    for site in range(3):
        R, _ = np.linalg.qr(draw.normal(size=(2, 2)))
        updates.append(Update(site, {"a": R.T @ current["a"], "b": current["b"] @ R, "h": np.full(3, float(site))}))
    merged = METHOD.merge(current, together(updates), Memory(), Now(1, LAYOUT, MergeSettings(), {})).tensors
    for name in ("a", "b"):
        np.testing.assert_allclose(merged[name], current[name], atol=1e-6)
    np.testing.assert_allclose(merged["h"], 1.0)


def test_a_round_is_the_mean_of_what_was_turned(finished: Callable[..., Finished]) -> None:
    done = finished(strategy="fedrot-lora", lora__head="trained", num_rounds=3)
    layout = MODELS.learner(done.settings).adapter.layout
    paired = {name for pair in factors_of(layout) for name in pair}
    exchanged, after = done.spy.training(2), arrays_of(done.spy.training(3)[0][0])
    start = {name: value.double().numpy() for name, value in arrays_of(exchanged[0][0]).items()}
    sent = [{name: value.double().numpy() for name, value in arrays_of(reply).items()} for _, reply in exchanged]
    for name_A, name_B in factors_of(layout):
        turned = []
        for own in sent:
            R, _ = orthogonal_procrustes(np.vstack([own[name_A].T, own[name_B]]), np.vstack([start[name_A].T, start[name_B]]))
            turned.append((R.T @ own[name_A], own[name_B] @ R))
        for i, name in enumerate((name_A, name_B)):
            np.testing.assert_allclose(after[name], np.mean([pair[i] for pair in turned], axis=0), atol=1e-6)
            assert np.abs(after[name].numpy() - np.mean([own[name] for own in sent], axis=0)).max() > 1e-6  # it did turn
    for name in layout.names - paired:
        np.testing.assert_allclose(after[name], np.mean([own[name] for own in sent], axis=0), atol=1e-6)


def test_it_needs_every_update_and_adapters() -> None:
    with pytest.raises(ConfigError, match="combines adapters, and no gradients"):
        small(Path("x"), strategy="fedrot-lora", trust="secure-sum", train__local_steps=1)
