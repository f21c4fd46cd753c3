"""A real site in a run that starts with a ridge head: two noises in one count, under the caps of the whole run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context

from lalora_flwr.ledger.entries import Reserve
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.privacy.accounting import epsilon_spent
from lalora_flwr.privacy.events import SampledGaussian
from lalora_flwr.server.plan import make_plan
from lalora_flwr.settings.stages import ridge_stage
from tests.conftest import small
from tests.ledger.site_ledgers import owned
from tests.sites import REAL, train_order

MakeReal = Callable[..., Context]
FIRST: dict[str, Any] = {"lora__head": "ridge", "num_rounds": 3}


def _entries(context: Context) -> list[Reserve]:
    ledger = LedgerFile(str(context.node_config["ledger-path"]))
    return [entry for entry in ledger.read().entries if isinstance(entry, Reserve)]


@pytest.fixture
def real(context: Callable[..., Context], tmp_path: Path) -> MakeReal:
    return lambda settings, **changed: owned(context(settings), tmp_path, **changed)


def test_a_real_site_counts_both_noises_in_one_run_and_serves_the_head_once(tmp_path: Path, real: MakeReal) -> None:
    settings = small(tmp_path, **FIRST)
    stage, held = ridge_stage(settings), real(settings)
    first = REAL(train_order(stage, 1), held)
    assert not first.has_error(), first.error
    again = REAL(train_order(stage, 1), real(settings))
    assert "served all the steps" in again.error.reason
    for server_round in (2, 3):
        reply = REAL(train_order(settings, server_round), real(settings))
        assert not reply.has_error(), reply.error
    last = REAL(train_order(settings, 4), real(settings))
    assert "budget" in last.error.reason
    head, *others = _entries(held)
    assert (head.strategy, head.q, head.steps, head.run_epsilon) == ("ridge-head", 1.0, 1, 0.5 * settings.privacy.epsilon)
    assert {(entry.strategy, entry.steps) for entry in others} == {("la-lora", 2)} and len(others) == 2
    steps = [SampledGaussian(entry.sigma, entry.q, entry.steps) for entry in (head, *others)]
    assert 0.98 * settings.privacy.epsilon < epsilon_spent(steps, settings.privacy.delta) <= settings.privacy.epsilon


def test_a_resumed_runs_head_is_counted_by_a_real_site_that_never_saw_its_id(tmp_path: Path, real: MakeReal) -> None:
    """Else a server could have the rounds of the head and of the others as two runs, each within ε."""
    settings = small(tmp_path, **FIRST)
    reply = REAL(train_order(settings, 2, counted_steps=1, counted_before=1), real(settings))
    sigma = reply.content["counters"]["noise-multiplier"]
    head = make_plan(settings).head_noise
    want = epsilon_spent([(head, 1.0, 1), (sigma, 40 / 300, 2)], settings.privacy.delta, settings.privacy.accountant)
    assert reply.content["counters"]["epsilon"] == pytest.approx(want, rel=1e-9)
    assert reply.content["counters"]["steps"] == 3


def test_the_owner_allows_the_head_by_its_own_name(tmp_path: Path, real: MakeReal) -> None:
    settings = small(tmp_path, **FIRST)
    only = {"allowed-strategies": "la-lora"}
    assert "strategy" in REAL(train_order(ridge_stage(settings), 1), real(settings, **only)).error.reason
    both = {"allowed-strategies": "la-lora,ridge-head"}
    assert not REAL(train_order(ridge_stage(settings), 1), real(settings, **both)).has_error()


def test_a_run_that_the_owner_refuses_gets_no_head_of_it_either(tmp_path: Path, real: MakeReal) -> None:
    """The caps are about the run: its share of epsilon, its method and its steps are not those of the first round."""
    for changed, caps in (
        ({"privacy__epsilon": 16.0}, {"max-epsilon": 8.0}),
        ({}, {"allowed-strategies": "ridge-head,dp-lora"}),
        ({"train__local_steps": 7}, {"max-steps-per-round": 5}),
        ({"lora__alpha": 64.0}, {"alpha-range": "0.1,8"}),
        ({"train__lr": 2.0}, {"lr-range": "0.01,1"}),
    ):
        settings = small(tmp_path, **{**FIRST, **changed})
        held = real(settings, **caps)
        assert REAL(train_order(ridge_stage(settings), 1), held).error.reason.startswith("cap: ")
        assert not _entries(held)


@pytest.mark.parametrize("limits", ["0.4,0.6", "0.05,0.5", "1.5,50"])
def test_a_range_of_rates_is_not_about_the_head(limits: str, tmp_path: Path, real: MakeReal) -> None:
    low, high = map(float, limits.split(","))
    settings = small(tmp_path, **{**FIRST, "train__lr": (low + high) / 2})
    assert not REAL(train_order(ridge_stage(settings), 1), real(settings, **{"lr-range": limits})).has_error()
