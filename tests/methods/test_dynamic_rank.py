"""Dynamic rank against dense transcriptions, and what a site takes, trains and noises under it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context
from hypothesis import given
from hypothesis import strategies as st

from lalora_flwr.adapter.slots import HEAD, LORA_A, LORA_B, Layout, Slot, corner, digest
from lalora_flwr.engines.inline import run_inline
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.dynamic_rank import METHOD, RANKS, Leading, edge, in_order, noise_of_mean
from lalora_flwr.methods.fedsvd import factors_of
from lalora_flwr.methods.merges import Memory, Merged, Now
from lalora_flwr.methods.method import method_of
from lalora_flwr.methods.updates import Update, together
from lalora_flwr.settings.schema import MergeSettings
from lalora_flwr.wire.tensors import to_arrays
from tests.conftest import Finished, arrays_of, small, strict_json
from tests.ledger.site_ledgers import owned
from tests.server.test_resume import killed_after, result, resumed
from tests.sites import REAL, servers_learner, train_order

M, N, RANK = 14, 11, 6
LAYOUT = Layout(
    [Slot("a", "x", LORA_A, (RANK, N), 1), Slot("b", "x", LORA_B, (M, RANK), 0), Slot("c", "head", HEAD, (3,))],
)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_the_product_stays_and_leads_in_the_order_of_its_singular_values(r: int, k: int, m: int, n: int, seed: int) -> None:
    draw, k = np.random.default_rng(seed), min(k, r)
    A, B = draw.normal(size=(r, n)), draw.normal(size=(m, k))
    new_A, new_B, values = in_order(A, B)
    assert new_A.shape == (r, n) and new_B.shape == (m, r)
    dense = B @ A[:k]
    np.testing.assert_allclose(new_B @ new_A, dense, atol=1e-9)
    of_dense = np.linalg.svd(dense, compute_uv=False)
    np.testing.assert_allclose(values[: min(m, k, n)], of_dense[: min(m, k, n)], atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(new_B, axis=0)[: len(values)], values[:r], atol=1e-9)
    assert not new_B[:, len(values) :].any()
    np.testing.assert_allclose(new_A @ new_A.T, np.diag([1.0] * min(r, n) + [0.0] * (r - min(r, n))), atol=1e-9)
    np.testing.assert_allclose(A @ new_A.T @ new_A, A, atol=1e-9)  # the same row space


def test_the_noise_is_what_products_of_two_sites_lack() -> None:
    draw, found = np.random.default_rng(0), []
    signal = draw.normal(size=(5, 4))
    for _ in range(2000):
        moved = [signal + 0.5 * draw.normal(size=(5, 4)) for _ in range(3)]
        pairs = [float((x * y).sum()) for x, y in itertools.permutations(moved, 2)]
        literal = (np.mean([(x**2).sum() for x in moved]) - np.mean(pairs)) / (3 * 20)
        found.append(noise_of_mean(moved))
        assert found[-1] == pytest.approx(literal)
    assert np.mean(found) == pytest.approx(0.5**2 / 3, rel=0.02)  # variance of an entry of the mean of three
    assert noise_of_mean([signal, signal]) == 0.0


def test_the_edge_is_about_the_largest_singular_value_of_noise() -> None:
    draw = np.random.default_rng(1)
    largest = [np.linalg.svd(0.3 * draw.normal(size=(200, 8)), compute_uv=False)[0] for _ in range(50)]
    assert np.mean(largest) == pytest.approx(edge(0.09, 200, 8), rel=0.05)


class Server:
    """The merge as a server calls it, sites that step along a signal with noise, and a transcription of it on dense matrices."""

    def __init__(self, seed: int) -> None:
        self.draw = np.random.default_rng(seed)
        self.adapter = {"a": self.draw.normal(size=(RANK, N)) / 3, "b": np.zeros((M, RANK)), "c": np.zeros(3)}
        self.adapter = {name: value.astype(np.float32) for name, value in self.adapter.items()}
        self.memory, self.rank, self.kept, self.walked = Memory(), RANK, RANK, 0.0

    def round(self, server_round: int, signal: Any, noise: float, sites: int = 4) -> Merged:
        k, A = self.rank, self.adapter["a"].astype(np.float64)
        start = self.adapter["b"][:, :k]
        moved = [signal @ A[:k].T + noise * self.draw.normal(size=(M, k)) for _ in range(sites)]
        sent = [
            Update(site, {"b": (start + d).astype(np.float32), "c": np.full(3, float(site), dtype=np.float32)})
            for site, d in enumerate(moved)
        ]
        merged = METHOD.merge(self.adapter, together(sent), self.memory, Now(server_round, LAYOUT, MergeSettings(), {}))
        steps = [u.tensors["b"].astype(np.float64) - start for u in sent]
        squares = sum((d**2).sum() for d in steps) / sites
        products = sum((x * y).sum() for x, y in itertools.permutations(steps, 2)) / (sites * (sites - 1))
        self.walked += max(squares - products, 0) / (sites * M * k) * np.mean([row @ row for row in A[:k]])
        dense = np.mean([u.tensors["b"].astype(np.float64) for u in sent], axis=0) @ A[:k]
        U, S, W = np.linalg.svd(dense)
        S = np.append(S, np.zeros(RANK))[:k]
        keep = min(int((np.sqrt(self.walked) * (np.sqrt(M) + np.sqrt(k)) < S).sum()) + 1, RANK)
        rank = RANK if server_round % 5 == 0 else keep
        assert merged.directive == {RANKS: {"x": rank}} and merged.rewritten
        assert float(merged.memory.tensors["b"]) == pytest.approx(self.walked, rel=1e-4)
        product = merged.tensors["b"].astype(np.float64) @ merged.tensors["a"]
        shown = min(keep, k)
        np.testing.assert_allclose(product, (U[:, :shown] * S[:shown]) @ W[:shown], atol=1e-5)
        assert not merged.tensors["b"][:, keep:].any()
        np.testing.assert_allclose(merged.tensors["a"] @ merged.tensors["a"].T, np.eye(RANK), atol=1e-5)
        np.testing.assert_allclose(merged.tensors["c"], np.mean(range(sites)))
        self.adapter = {name: np.asarray(value) for name, value in merged.tensors.items()}
        self.memory, self.rank, self.kept = merged.memory, rank, keep
        return merged


def planted(rank: int, seed: int = 5) -> Any:
    """A step of the product's gradient that has this rank."""
    draw = np.random.default_rng(seed)
    return draw.normal(size=(M, rank)) @ draw.normal(size=(rank, N))


@pytest.mark.parametrize(("noise", "signal"), [(0.5, 2), (0.01, 3), (2.0, 0), (0.2, 6)])
def test_the_merge_is_its_rule_on_dense_matrices_and_finds_the_rank(noise: float, signal: int) -> None:
    server = Server(0)
    for server_round in range(1, 11):
        server.round(server_round, 0.5 * planted(signal) if signal else np.zeros((M, N)), noise)
    assert server.kept == min(signal + 1, RANK)


def test_the_rank_grows_when_there_is_more_to_find_and_shrinks_when_it_is_gone() -> None:
    server, ranks = Server(1), []
    for server_round in range(1, 31):
        change = [0, 1, -1][(server_round - 1) // 10] * planted(3, 6)  # for a third each: not there, added, taken away again
        server.round(server_round, 0.4 * (planted(1) + change), 0.3)
        ranks.append(server.kept)
    assert ranks[9] == 2 and ranks[19] == 5 and ranks[29] < 5, ranks


NAMED = {RANKS: {"x": 3}}


def test_a_schedule_takes_ranks_of_its_layers_and_nothing_else() -> None:
    schedule = Leading()
    assert schedule.accepts(LAYOUT, {}) and schedule.accepts(LAYOUT, NAMED)
    bad: list[Any] = [0, -1, RANK + 1, True, 2.0, "2", None, [2], {}]
    refused: list[Any] = [{RANKS: {"x": rank}} for rank in bad]
    refused += [{RANKS: {}}, {RANKS: {"y": 2}}, {RANKS: {"x": 2, "y": 2}}, {RANKS: [["x", 2]]}, {RANKS: None}]
    refused += [{"lr": 1.0}, {**NAMED, "lr": 1.0}]
    assert not any(schedule.accepts(LAYOUT, directive) for directive in refused)
    held = schedule.within(LAYOUT, NAMED)
    assert [slot.shape for slot in held.values()] == [(3, N), (M, 3), (3,)] and schedule.within(LAYOUT, {}) == LAYOUT
    assert schedule.mask(held, 2, 0, NAMED) == {"b", "c"}


RUN: dict[str, Any] = {"strategy": "dynamic-rank", "num_rounds": 4, "lora__rank": 4}


def test_sites_hold_train_and_send_the_components_that_the_server_names(finished: Callable[..., Finished]) -> None:
    done = finished(**RUN)
    layout = servers_learner(done.settings).adapter.layout
    pairs, narrower = list(factors_of(layout)), 0
    for server_round in (1, 2, 3, 4):
        for order, reply in done.spy.training(server_round):
            ranks = strict_json(str(order.content["config"]["directive"])).get(RANKS, {})
            got, sent = arrays_of(order), arrays_of(reply)
            for name_A, name_B in pairs:
                k = ranks.get(layout[name_B].layer, 4)
                narrower += k < 4
                assert got[name_A].shape[0] == got[name_B].shape[1] == sent[name_B].shape[1] == k
                assert name_A not in sent and bool((sent[name_B] != got[name_B]).all())  # each held entry has noise
    assert narrower


def test_it_goes_on_after_a_death(tmp_path: Path, finished: Callable[..., Finished]) -> None:
    killed_after(small(tmp_path, **RUN), 2)
    run_inline(resumed(tmp_path, **RUN))
    assert result(tmp_path / "run") == result(finished(**RUN).path)


def test_a_real_site_holds_an_order_to_its_directive(tmp_path: Path, context: Callable[..., Context]) -> None:
    settings = small(tmp_path, **RUN)
    learner = servers_learner(settings)
    layout = learner.adapter.layout
    named = {RANKS: {layout[name].layer: 2 for name, _ in factors_of(layout)}}
    held = method_of(settings).schedule.within(layout, named)
    cut = {name: corner(learner.initial[name], slot) for name, slot in held.items()}

    def ask(directive: Any, tensors: Any) -> Any:
        order = train_order(settings, directive=directive, adapter_digest=digest(tensors))
        order.content["arrays"] = to_arrays(tensors)
        return REAL(order, owned(context(settings), tmp_path))

    reply = ask(named, cut)
    assert {v.shape[1] for n, v in arrays_of(reply).items() if layout[n].part == LORA_B} == {2}
    assert ask({}, cut).error.reason.startswith("adapter: ")
    assert ask(named, dict(learner.initial)).error.reason.startswith("adapter: ")
    assert ask({RANKS: {**named[RANKS], "more": 2}}, cut).error.reason.startswith("order: its directive")
    assert ask({RANKS: dict.fromkeys(named[RANKS], 0)}, cut).error.reason.startswith("order: its directive")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"lora__schedule": "step:BA"}, "lora.schedule = 'step:BA': must be 'auto' for strategy = 'dynamic-rank'"),
        ({"merge__name": "median"}, "merge.name = 'median': must be 'auto' for strategy = 'dynamic-rank'"),
        ({"trust": "secure-sum", "train__local_steps": 1}, "merge.name = 'above-noise': combines adapters"),
        ({"num_supernodes": 1, "data__partition": "iid"}, "merge.name = 'above-noise': needs 2 sites a round"),
        (
            {"filter__name": "doppler"},
            "filter.name = 'doppler': doppler remembers gradients, of factors",
        ),
        ({"strategy": "fedsvd", "filter__name": "wiener"}, "filter.name = 'wiener': wiener remembers gradients"),
    ],
)
def test_what_makes_no_sense_is_refused(changed: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        small(tmp_path, **{**RUN, **changed})
