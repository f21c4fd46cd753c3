"""Sites that send what no honest site can: they are left out and named, under every merge, and the run goes on without them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, Context, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lalora_flwr.adapter.slots import LORA_A, LORA_B, Layout, Slot
from lalora_flwr.ground.errors import RunFailed
from lalora_flwr.methods.smoothing import binomial, smooth_rows
from lalora_flwr.server.longest import Sends, longest_draw, longest_update, most_drawn
from lalora_flwr.server.stopping import far_longer
from lalora_flwr.wire.orders import ARRAYS
from lalora_flwr.wire.replies import Counters
from tests.conftest import AppCall, Finished, Spy, run_spied, small
from tests.server.federations import failing
from tests.server.lies import LIAR

Spoil = Callable[[NDArray[np.float32]], NDArray[np.float32]]
LIES: list[tuple[Spoil, str]] = [  # of each round one
    (lambda value: np.full_like(value, 9e3), "clip, noise, rate and steps allow"),
    (lambda value: np.full_like(value, math.nan), "not finite"),
    (lambda value: value + np.float32(7.0), "clip, noise, rate and steps allow"),
    (lambda value: value[:1].copy() if value.ndim > 1 else value[:-1].copy(), "wrong shape"),
    (lambda value: np.full_like(value, -1e30), "above"),
    (lambda value: np.full_like(value, math.inf), "not finite"),
]
MERGES: dict[str, dict[str, Any]] = {
    "mean": {"strategy": "la-lora"},
    "mean of gradients": {"strategy": "ffa-lora", "train__step_at": "server", "train__local_steps": 1},
    "a rate by rule": {"strategy": "dp-lora", "train__lr": 0.0},
    "AdamW": {"strategy": "dp-lora", "train__optimizer": "adamw", "train__lr": 0.01},
    "median": {"strategy": "dp-lora", "merge__name": "median"},
    "trimmed mean": {"strategy": "dp-lora", "merge__name": "trimmed-mean", "merge__trim": 0.34},
    "a bound of the run's": {"strategy": "dp-lora", "merge__max_update_norm": 0.5},
    "per entry": {"strategy": "hetlora", "profiles": "rank=1;rank=2;layers=1;rank=2"},
    "zero-padded": {"strategy": "hetlora", "merge__name": "zero-padded"},
    "flexlora": {"strategy": "flexlora"},
    "hlora": {"strategy": "hlora"},
    "fedex-lora": {"strategy": "fedex-lora"},
    "flora": {"strategy": "flora"},
    "flora of several ranks": {"strategy": "flora", "profiles": "rank=1;rank=2;layers=1;rank=2"},
    "fedrot-lora": {"strategy": "fedrot-lora"},
    "fedsvd": {"strategy": "fedsvd"},
    "as-lora": {"strategy": "as-lora"},
    "dynamic-rank": {"strategy": "dynamic-rank"},
    "fedsa-lora": {"strategy": "fedsa-lora"},
    "ridge head first": {"strategy": "dp-lora", "lora__head": "ridge"},
}


def spoiling(lies: Mapping[int, Spoil]) -> Callable[[Message, Context, AppCall], Message]:
    """One site that changes all tensors of its replies, by round."""

    def behave(message: Message, context: Context, app: AppCall) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == LIAR:
            config: Any = message.content["config"]
            if spoil := lies.get(config["server-round"]):
                spoil_all(reply.content, spoil)
        return reply

    return behave


def spoil_all(content: RecordDict, spoil: Spoil) -> None:
    arrays: Any = content[ARRAYS]
    for name in arrays:
        arrays[name] = Array(spoil(arrays[name].numpy()).astype(np.float32))


@pytest.mark.parametrize("merge", MERGES)
def test_every_kind_of_lie_is_left_out_under_every_merge(merge: str, tmp_path: Path) -> None:
    """The result is that of a run in which the site did not answer in those rounds."""
    overrides = {"num_supernodes": 4, "num_rounds": len(LIES), **MERGES[merge]}
    rounds = range(1, len(LIES) + 1)
    lying = Spy(spoiling({server_round: lie for server_round, (lie, _) in zip(rounds, LIES, strict=True)}))
    lied = Finished(run_spied(settings := small(tmp_path / "lying", **overrides), lying), settings, lying)
    silent = Spy(failing(LIAR, rounds=rounds))
    missing = Finished(run_spied(settings := small(tmp_path / "silent", **overrides), silent), settings, silent)
    for line, (_, reason) in zip(lied.metrics, LIES, strict=True):
        assert list(line["failed_sites"]) == [str(LIAR)] and line["failures"] == 1 and line["sites"] == 3
        assert reason in line["failed_sites"][str(LIAR)], line["round"]
    for name, value in missing.checkpoint.items():
        if not name.startswith("more/site/"):
            assert torch.equal(value, lied.checkpoint[name]), name
    log = (lied.path / "flower.log").read_text()
    assert [log.count(f"round {number}: site {LIAR} failed (reply rejected: ") for number in rounds] == [1] * len(LIES)


@pytest.mark.parametrize("strategy", ["flexlora", "flora", "fedex-lora"])
def test_without_a_bound_the_one_that_makes_a_product_too_large_is_left_out(strategy: str, tmp_path: Path) -> None:
    """Without privacy nothing is clipped, so that the server knows no bound."""
    overrides = {"strategy": strategy, "num_supernodes": 4, "privacy__epsilon": math.inf}
    lying, silent = Spy(spoiling({1: LIES[0][0]})), Spy(failing(LIAR, rounds=[1]))
    lied = Finished(run_spied(settings := small(tmp_path / "lying", **overrides), lying), settings, lying)
    missing = Finished(run_spied(settings := small(tmp_path / "silent", **overrides), silent), settings, silent)
    first, second = lied.metrics
    assert "makes too large values" in first["failed_sites"][str(LIAR)] and (first["sites"], second["sites"]) == (3, 4)
    assert second["failures"] == 0
    for name, value in missing.checkpoint.items():
        assert torch.equal(value, lied.checkpoint[name]), name


def test_where_all_are_too_long_the_run_stops_and_says_why(tmp_path: Path) -> None:
    """Nobody is blamed for a rate that is too large."""

    def behave(message: Message, context: Context, app: AppCall) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "train":
            spoil_all(reply.content, LIES[0][0])
        return reply

    with pytest.raises(RunFailed, match=r"^round 1: the merge 'stack' made values above 10000.* or train.lr is too large"):
        run_spied(small(tmp_path, strategy="flora", privacy__epsilon=math.inf), Spy(behave))


def test_more_liars_than_max_failures_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"1 of 3 sites failed, max-failures = 0 \(site 1: reply rejected: its update is .* long"):
        run_spied(small(tmp_path, max_failures=0), Spy(spoiling({1: LIES[0][0]})))


@given(st.lists(st.floats(1e-3, 10), min_size=1, max_size=9), st.integers(0, 8))
def test_one_is_far_longer_than_the_others_or_none_is(lengths: list[float], at: int) -> None:
    others = dict(enumerate(lengths, 1))
    assert far_longer({**others, 0: 101.0}) == 0
    assert far_longer({**others, 0: sorted(lengths)[len(lengths) // 2]}) in (None, *others)
    assert far_longer({0: 5.0}) is None


# the bound


SETTINGS: dict[str, Any] = {"strategy": "dp-lora", "train__lr": 1.0}
LAYOUT = Layout([Slot("a", "x", LORA_A, (4, 50), 1), Slot("b", "x", LORA_B, (30, 4), 0)])


def bound(tmp_path: Path, sigma: float = 2.0, q: float = 0.1, start: float = 0.0, **overrides: Any) -> float:
    from lalora_flwr.methods.method import method_of

    settings = small(tmp_path, **{**SETTINGS, **overrides})
    sends = Sends(LAYOUT, LAYOUT, [LAYOUT.names], start)
    return longest_update(settings, method_of(settings), sends, Counters(0, 0.0, sigma, q, seeded=True))


def simulated(sigma: float, steps: int, *, momentum: float = 0.0, decay: float = 0.0, adamw: bool = False) -> float:
    """The longest of many honest rounds in which every record is clipped and all agree, from an adapter of length 1."""
    size, batch, longest = 320, 40, 0.0
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        w = torch.nn.Parameter(torch.full((size,), size**-0.5))
        start = w.detach().clone()
        make: Any = torch.optim.AdamW if adamw else torch.optim.SGD
        optimizer = make([w], lr=1.0, weight_decay=decay, **({} if adamw else {"momentum": momentum}))
        for _ in range(steps):
            drawn = float(torch.poisson(torch.tensor(float(batch)), generator=draw))
            signal = torch.full((size,), size**-0.5) * drawn
            w.grad = (signal + sigma * torch.randn(size, generator=draw)) / batch
            optimizer.step()
        longest = max(longest, float((w.detach() - start).norm()))
    return longest


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "momentum": ({"train__momentum": 0.9}, {"momentum": 0.9}),
    "weight decay": ({"train__weight_decay": 0.1}, {"decay": 0.1}),
    "AdamW": ({"train__optimizer": "adamw", "train__weight_decay": 0.1}, {"adamw": True, "decay": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("sigma", [0.5, 30.0])
def test_honest_rounds_are_within_the_bound_and_not_far_below(case: str, steps: int, sigma: float, tmp_path: Path) -> None:
    overrides, told = CASES[case]
    most = bound(tmp_path, sigma, start=1.0, train__local_steps=steps, **overrides)
    longest = simulated(sigma, steps, **told)
    assert longest < most < (200 if told.get("adamw") else 20) * longest


def test_what_decides_the_bound(tmp_path: Path) -> None:
    plain = bound(tmp_path)
    assert bound(tmp_path, train__lr=2.0) == pytest.approx(2 * plain)
    assert bound(tmp_path, privacy__clip_norm=3.0) == pytest.approx(3 * plain)
    assert plain < bound(tmp_path, sigma=4.0) < 2 * plain
    assert bound(tmp_path, sigma=0.0) == math.inf  # without privacy nothing is clipped
    assert bound(tmp_path, q=1.0) > plain  # of how many records is not known
    server = {"strategy": "ffa-lora", "train__local_steps": 1, "train__step_at": "server"}
    assert bound(tmp_path, **server, train__lr=5.0) == bound(tmp_path, **server)


def test_the_tails_are_those_of_the_distributions() -> None:
    """At a tail that can be looked up: of ten million draws about one is beyond e^-16."""
    from scipy import stats

    for size in (1, 10, 1000, 10**6):
        assert longest_draw({1.0: size}) ** 2 >= stats.chi2.isf(1e-9, size)
        assert longest_draw({4.0: size}) == pytest.approx(2 * longest_draw({1.0: size}))
    for batch in (1, 40, 4096):
        assert most_drawn(1, batch) * batch >= stats.poisson.isf(1e-9, 2 * batch)
        assert most_drawn(10, batch) * batch >= stats.poisson.isf(1e-9, 20 * batch)


@given(st.integers(1, 60), st.sampled_from([3, 5, 33]), st.integers(0, 10**6))
def test_the_low_pass_filters_make_nothing_longer(features: int, width: int, seed: int) -> None:
    x = torch.randn(3, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert float(smooth_rows(x, width).norm()) <= float(x.norm()) * (1 + 1e-9)
    matrix = smooth_rows(torch.eye(features, dtype=torch.float64), width)
    assert float(torch.linalg.matrix_norm(matrix, 2)) <= 1 + 1e-9 and sum(binomial(width)) == 1
