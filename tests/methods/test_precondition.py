"""The preconditioned step: the least-squares image of the layer's gradient, at the site and at the server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.precondition import DAMPING, preconditioned
from lalora_flwr.server.plan import make_plan
from tests.conftest import Finished, small
from tests.server.test_stepping import adapter

MAKE: dict[str, Any] = {"strategy": "la-lora", "filter__name": "precondition", "privacy__accountant": "rdp"}
ONE: dict[str, Any] = {"train__local_steps": 1, "num_rounds": 2}
SERVER: dict[str, Any] = {**ONE, "train__step_at": "server"}


@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7), st.integers(0, 10**6))
def test_it_is_the_damped_least_squares_image_of_the_layers_gradient(rank: int, m: int, n: int, seed: int) -> None:
    """Theorem 2 in its own words: X minimises ‖X A - G‖² + δ ‖X‖², and g_B is G Aᵀ."""
    draw = torch.Generator().manual_seed(seed)
    G, A, B = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((m, n), (rank, n), (m, rank)))
    root = DAMPING**0.5 * torch.eye(rank, dtype=torch.float64)
    of_b = torch.linalg.lstsq(torch.cat([A.T, root]), torch.cat([G.T, torch.zeros(rank, m, dtype=torch.float64)])).solution.T
    of_a = torch.linalg.lstsq(torch.cat([B, root]), torch.cat([G, torch.zeros(rank, n, dtype=torch.float64)])).solution
    torch.testing.assert_close(preconditioned(G @ A.T, A, is_b=True), of_b)
    torch.testing.assert_close(preconditioned(B.T @ G, B, is_b=False), of_a)


def test_the_servers_step_is_the_sites(finished: Callable[..., Finished]) -> None:
    """B in round 1 and A in round 2."""
    own, servers = (adapter(finished(**MAKE, **how)) for how in (ONE, SERVER))
    for name in own:
        torch.testing.assert_close(servers[name], own[name], rtol=0, atol=1e-5)


def test_a_rate_has_to_be_named_and_there_must_be_factors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.lr = 0: the rule does not know what filter\.name = 'precondition' leaves"):
        small(tmp_path, **MAKE, train__lr=0)
    with pytest.raises(ConfigError, match=r"filter\.name = 'precondition': the form has no layer with lora_A and lora_B"):
        make_plan(small(tmp_path, strategy="ridge-head", filter__name="precondition", train__lr=0.1))
