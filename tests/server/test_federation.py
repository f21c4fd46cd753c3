"""Whole runs on the inline engine: what is averaged, what is counted, what is written, and when a run stops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from lalora_flwr.data.digits import test_part as public_test_part
from lalora_flwr.engines.inline import FIRST_NODE, InlineGrid
from lalora_flwr.ground.errors import ConfigError, RunFailed
from lalora_flwr.methods.merges import Memory, Merge, Merged, Now
from lalora_flwr.methods.updates import Tensors, Updates
from lalora_flwr.models.embedded import build_vit_digits
from lalora_flwr.server.metrics import RoundMetrics
from lalora_flwr.server.roster import Roster
from lalora_flwr.server.run import run_federation
from lalora_flwr.server.strategy import FederatedStrategy
from lalora_flwr.settings import flatten
from lalora_flwr.settings.choices import MERGES, METHODS
from lalora_flwr.wire.tensors import to_arrays
from tests.conftest import (
    MODELS,
    SITES,
    AppCall,
    Finished,
    Spy,
    arrays_of,
    factors_of,
    files_in,
    run_spied,
    small,
    strict_json,
)
from tests.sites import servers_learner

Behaviour = Callable[[Message, Context, AppCall], Message]
REASON = "failure: the site's own log says why"

METRICS = {"round", "accuracy", "loss", "epsilon", "sites", "failures", "seconds", "bytes_up", "bytes_down"}
SUMMARY = {
    *("strategy", "model", "data", "seed", "rounds", "accuracy", "epsilon", "delta", "noise_multiplier", "sample_rate"),
    *("clip_norm", "accountant", "private", "seeded", "seconds", "peak_memory_mb", "versions"),
}


def site_of(context: Context) -> int:
    return int(context.node_config["partition-id"])


def failing(*sites: int, rounds: Iterable[int] = (1, 2)) -> Behaviour:
    """Sites that answer training with an error in some rounds."""

    def behave(message: Message, context: Context, app: AppCall) -> Message:
        training = message.metadata.message_type == "train"
        if training and site_of(context) in sites and message.content["config"]["server-round"] in rounds:
            return Message(Error(code=2, reason=REASON), reply_to=message)
        return app(message, context)

    return behave


def lying(number: int, lie: Callable[[RecordDict], None]) -> Behaviour:
    """One site that spoils its otherwise good training replies."""

    def behave(message: Message, context: Context, app: AppCall) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "train" and site_of(context) == number:
            lie(reply.content)
        return reply

    return behave


def mean_of(messages: list[tuple[Message, Message]]) -> dict[str, Tensor]:
    """The uniform mean of the tensors in some replies."""
    values = [arrays_of(reply) for _, reply in messages]
    return {name: torch.stack([v[name].double() for v in values]).mean(0).float() for name in values[0]}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-7)


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Factors of which a tensor moved."""
    return factors_of(name for name in after if not torch.equal(before[name], after[name]))


def stopped(settings: Any, spy: Spy) -> str:
    """Why the run stopped, which its folder must say too."""
    with pytest.raises(RunFailed) as caught:
        run_spied(settings, spy)
    folder = Path(settings.output_dir) / settings.run_name
    assert strict_json((folder / "failure.json").read_text()) == {"error": str(caught.value)}
    assert not (folder / "summary.json").exists() and not (folder / "adapter").exists()
    return str(caught.value)


@pytest.mark.parametrize("strategy", METHODS.names())
def test_the_next_rounds_adapter_is_the_mean_of_the_replies(strategy: str, finished: Callable[..., Finished]) -> None:
    run = finished(strategy=strategy)
    first, second = run.spy.training(1), run.spy.training(2)
    for order, _ in second:
        received = arrays_of(order)
        assert_equal({n: received[n] for n in arrays_of(first[0][1])}, mean_of(first))
    assert_equal({n: run.checkpoint[n] for n in arrays_of(second[0][1])}, mean_of(second))


@pytest.mark.parametrize(
    ("strategy", "round_1", "round_2"),
    [
        ("la-lora", {"A", "B"}, {"A", "B"}),
        ("dp-lora", {"A", "B"}, {"A", "B"}),
        ("ffa-lora", {"B"}, {"B"}),
        ("rolora", {"B"}, {"A"}),
    ],
)
def test_each_strategy_moves_the_factors_it_should(
    strategy: str, round_1: set[str], round_2: set[str], finished: Callable[..., Finished]
) -> None:
    one, two = finished(strategy=strategy, num_rounds=1), finished(strategy=strategy)
    initial = servers_learner(two.settings).initial
    assert changed(initial, one.checkpoint) == round_1
    middle = {**initial, **arrays_of(two.spy.training(2)[0][0])}
    assert changed(initial, middle) == round_1 and changed(middle, two.checkpoint) == round_2


def test_a_trained_head_moves_and_a_frozen_one_is_not_there(finished: Callable[..., Finished]) -> None:
    trained, frozen = finished(lora__head="trained"), finished()
    assert "head" in changed(servers_learner(trained.settings).initial, trained.checkpoint)
    assert "head" not in factors_of(frozen.checkpoint)


LIES: dict[str, Callable[[RecordDict], None]] = {}


def lie(function: Callable[[RecordDict], None]) -> Callable[[RecordDict], None]:
    LIES[function.__name__] = function
    return function


def first_array(content: RecordDict) -> tuple[ArrayRecord, str]:
    arrays: Any = content["arrays"]
    return arrays, sorted(arrays)[0]


@lie
def a_nan(content: RecordDict) -> None:
    arrays, name = first_array(content)
    values = arrays[name].numpy().copy()
    values[0, 0] = math.nan
    arrays[name] = Array(values)


@lie
def an_infinite_value(content: RecordDict) -> None:
    arrays, name = first_array(content)
    values = arrays[name].numpy().copy()
    values[-1, -1] = math.inf
    arrays[name] = Array(values)


@lie
def a_wrong_shape(content: RecordDict) -> None:
    arrays, name = first_array(content)
    arrays[name] = Array(arrays[name].numpy()[:1].copy())


@lie
def a_missing_tensor(content: RecordDict) -> None:
    arrays, name = first_array(content)
    del arrays[name]


@lie
def an_extra_record(content: RecordDict) -> None:
    content["loss"] = MetricRecord({"loss": 0.25})


@lie
def no_arrays(content: RecordDict) -> None:
    del content["arrays"]


@lie
def metrics_for_arrays(content: RecordDict) -> None:
    content["arrays"] = MetricRecord({"loss": 0.25})


@lie
def a_list_for_a_counter(content: RecordDict) -> None:
    content["counters"]["steps"] = [1, 2]


@lie
def no_number_for_a_counter(content: RecordDict) -> None:
    content["counters"]["steps"] = math.nan


@lie
def infinitely_many_steps(content: RecordDict) -> None:
    content["counters"]["steps"] = math.inf


@lie
def bytes_that_are_no_array(content: RecordDict) -> None:
    arrays, name = first_array(content)
    arrays[name].data = b"not an array"


@pytest.mark.parametrize("what", LIES)
def test_a_reply_that_breaks_the_contract_is_rejected_and_the_others_are_averaged(what: str, tmp_path: Path) -> None:
    spy = Spy(lying(1, LIES[what]))
    settings = small(tmp_path, num_rounds=1)
    run = Finished(run_spied(settings, spy), settings, spy)
    good = [pair for pair in spy.training(1) if pair[0].metadata.dst_node_id != FIRST_NODE + 1]
    assert len(good) == 2
    assert_equal(run.checkpoint, mean_of(good))
    (line,) = run.metrics
    assert (line["sites"], line["failures"]) == (2, 1)
    assert list(line["failed_sites"]) == ["1"] and line["failed_sites"]["1"].startswith("reply rejected: ")


@pytest.mark.parametrize(("factor", "problem"), [("A", "moved in a round in which it is frozen"), ("B", "did not move")])
def test_a_site_that_trained_other_factors_than_asked_is_rejected(factor: str, problem: str, tmp_path: Path) -> None:
    settings = small(tmp_path, num_rounds=1, lora__schedule="B")
    initial = to_arrays(servers_learner(settings).initial)

    def mistrain(content: RecordDict) -> None:
        arrays: Any = content["arrays"]
        for name in arrays:
            if factors_of([name]) == {factor}:
                arrays[name] = Array(initial[name].numpy() + np.float32(factor == "A"))

    run = Finished(run_spied(settings, spy := Spy(lying(1, mistrain))), settings, spy)
    (line,) = run.metrics
    assert list(line["failed_sites"]) == ["1"] and problem in line["failed_sites"]["1"]
    assert changed(servers_learner(settings).initial, run.checkpoint) == {"B"}


def test_a_liar_too_many_stops_the_run(tmp_path: Path) -> None:
    why = stopped(small(tmp_path, num_rounds=1, max_failures=0), Spy(lying(1, a_nan)))
    assert "1 of 3 sites failed" in why and "site 1: reply rejected: " in why


def test_a_run_goes_on_without_a_site_that_fails_and_says_which_and_why(tmp_path: Path) -> None:
    settings, spy = small(tmp_path), Spy(failing(1, rounds=[1]))
    run = Finished(run_spied(settings, spy), settings, spy)
    first, second = run.metrics
    assert (first["sites"], first["failures"], first["failed_sites"]) == (2, 1, {"1": REASON})
    assert (second["sites"], second["failures"], second["failed_sites"]) == (3, 0, {})
    assert run.summary["failures"] == 1
    good = [pair for pair in spy.training(1) if not pair[1].has_error()]
    assert_equal(arrays_of(spy.training(2)[0][0]), mean_of(good))


def test_failures_in_other_rounds_do_not_add_up_to_a_stop(tmp_path: Path) -> None:
    def one_a_round(message: Message, context: Context, app: AppCall) -> Message:
        server_round = message.content["config"]["server-round"] if message.content else 0
        return failing(server_round)(message, context, app)

    settings, spy = small(tmp_path, max_failures=1), Spy(one_a_round)
    assert Finished(run_spied(settings, spy), settings, spy).summary["failures"] == 2


@pytest.mark.parametrize(("allowed", "sites"), [(0, [2]), (1, [0, 2])])
def test_more_failures_than_allowed_stop_the_run(allowed: int, sites: list[int], tmp_path: Path) -> None:
    why = stopped(small(tmp_path, max_failures=allowed), Spy(failing(*sites)))
    assert why.startswith(f"round 1: {len(sites)} of 3 sites failed, max-failures = {allowed}")
    assert all(f"site {number}: {REASON}" in why for number in sites)


def test_a_run_that_stops_late_keeps_what_it_had(tmp_path: Path) -> None:
    why = stopped(small(tmp_path, max_failures=0), Spy(failing(0, rounds=[2])))
    assert why.startswith("round 2: ")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [strict_json(line)["round"] for line in lines] == [1]
    assert (tmp_path / "run" / "checkpoint" / "adapter.safetensors").exists()


def test_a_round_that_no_site_served_stops_the_run_whatever_is_allowed(tmp_path: Path) -> None:
    assert "no site is left" in stopped(small(tmp_path, max_failures=99), Spy(failing(0, 1, 2)))


class SilentGrid(InlineGrid):
    """A grid on which site 2 never answers a training order."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = super().send_and_receive(messages, timeout=timeout)
        silent = FIRST_NODE + 2
        return [m for m in replies if m.metadata.src_node_id != silent or m.metadata.message_type != "train"]


class ShuffledGrid(InlineGrid):
    """A grid on which replies arrive last site first."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return super().send_and_receive(messages, timeout=timeout)[::-1]


def on_grid(kind: type[InlineGrid], settings: Any, sites: int = 3) -> Finished:
    """A run on a grid with its own mind, as the inline engine would run it."""
    spy: Any = Spy()
    return Finished(run_federation(settings, kind(spy, sites, dict(flatten(settings))), models=MODELS), settings, spy)


def test_a_site_that_never_answers_counts_as_failed(tmp_path: Path) -> None:
    run = on_grid(SilentGrid, small(tmp_path))
    assert [line["failed_sites"] for line in run.metrics] == [{"2": "no reply"}] * 2
    assert run.summary["failures"] == 2
    with pytest.raises(RunFailed, match="site 2: no reply"):
        on_grid(SilentGrid, small(tmp_path, run_name="strict", max_failures=0))


class First(Merge):
    """Takes the first update, and notes all."""

    name = "first"

    def __init__(self) -> None:
        self.seen: list[list[bytes]] = []

    def __call__(self, current: Tensors, updates: Updates, memory: Memory, now: Now) -> Merged:
        each = [update.tensors for update in updates.each]
        self.seen.append([b"".join(tensors[name].tobytes() for name in sorted(tensors)) for tensors in each])
        return Merged({name: value.astype(np.float32) for name, value in each[0].items()})


class Broken(Merge):
    name = "broken"

    def __call__(self, *_: Any) -> Merged:
        raise ZeroDivisionError("oops")


FIRST = First()
MERGES.register("test-first", FIRST)
MERGES.register("test-broken", Broken())


def test_replies_are_merged_in_order_of_site_whatever_order_they_arrive_in(tmp_path: Path) -> None:
    FIRST.seen.clear()
    for name, kind in (("in-order", InlineGrid), ("shuffled", ShuffledGrid)):
        on_grid(kind, small(tmp_path, run_name=name, num_rounds=1, privacy__epsilon=math.inf, merge__name="test-first"))
    one, two = FIRST.seen
    assert one == two and len(set(one)) == 3


def test_another_number_of_sites_than_the_simulations_is_refused(tmp_path: Path) -> None:
    for sites in (2, 4):
        clock = itertools.count()  # a second passes whenever the server looks at it
        naps: list[float] = []

        def sleep(seconds: float, naps: list[float] = naps) -> None:
            naps.append(seconds)
            assert len(naps) < 100, "the server waits for sites that will never come"

        settings = small(tmp_path)
        grid = InlineGrid(SITES, sites, dict(flatten(settings)))
        roster = Roster(settings, real=False, clock=lambda clock=clock: float(next(clock)), sleep=sleep)
        with pytest.raises(RunFailed, match=f"num-supernodes = 3, but the simulation has {sites} sites"):
            roster.start_from(grid)


def test_a_bug_stops_the_run_and_the_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run_spied(small(tmp_path, merge__name="test-broken"), Spy())
    assert strict_json((tmp_path / "run" / "failure.json").read_text()) == {"error": "unexpected ZeroDivisionError: oops"}


@pytest.mark.parametrize(("sites", "share", "drawn"), [(4, 0.5, 2), (3, 0.5, 2)])
def test_a_round_asks_the_share_of_sites_and_no_site_too_often(sites: int, share: float, drawn: int, tmp_path: Path) -> None:
    rounds = 3
    settings = small(
        tmp_path,
        num_rounds=rounds,
        num_supernodes=sites,
        fraction_train=share,
        privacy__max_rounds=-(-rounds * drawn // sites),
        privacy__accountant="rdp",
        train__local_steps=1,
    )
    spies = [Spy(), Spy()]
    run = Finished(run_spied(settings, spies[0]), settings, spies[0])
    served = [[order.metadata.dst_node_id for order, _ in spies[0].training(r)] for r in range(1, rounds + 1)]
    assert [len(set(nodes)) for nodes in served] == [len(nodes) for nodes in served] == [drawn] * rounds
    assert [line["sites"] for line in run.metrics] == [drawn] * rounds
    asked = [sum(nodes.count(FIRST_NODE + number) for nodes in served) for number in range(sites)]
    assert max(asked) <= settings.privacy.max_rounds
    counted = {int(number): counters["steps"] for number, counters in run.summary["sites"].items()}
    assert counted == {number: times for number, times in enumerate(asked) if times}
    assert max(line["epsilon"] for line in run.metrics) <= settings.privacy.epsilon
    again = small(tmp_path, **{**flatten_overrides(settings), "run_name": "again"})
    run_spied(again, spies[1])
    assert served == [[order.metadata.dst_node_id for order, _ in spies[1].training(r)] for r in range(1, rounds + 1)]


def flatten_overrides(settings: Any) -> dict[str, Any]:
    return {name.replace(".", "__").replace("-", "_"): value for name, value in flatten(settings).items()}


class Choosy(InlineGrid):
    """A grid of which some nodes may be gone."""

    here: list[int] | None = None

    def get_node_ids(self) -> list[int]:
        return super().get_node_ids() if self.here is None else self.here


class Draws:
    """The server's choice of sites, without any training."""

    def __init__(self, folder: Path, **overrides: Any) -> None:
        self.settings = small(folder, **overrides)
        self.grid = Choosy(SITES, self.settings.num_supernodes, dict(flatten(self.settings)))
        learner = servers_learner(small(folder))
        self.strategy = FederatedStrategy(self.settings, learner.adapter.layout, lambda report: None)
        self.arrays = to_arrays(learner.initial)

    def in_round(self, server_round: int) -> list[int]:
        """The numbers of the sites asked."""
        orders = self.strategy.configure_train(server_round, self.arrays, ConfigRecord(), self.grid)
        return [order.metadata.dst_node_id - FIRST_NODE for order in orders]


@given(sites=st.integers(1, 7), share=st.floats(0.05, 1), rounds=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_sites_take_turns_so_that_the_fewest_rounds_each_suffice(sites: int, share: float, rounds: int, seed: int) -> None:
    drawn = max(1, round(share * sites))
    fewest = -(-rounds * drawn // sites)
    draws = Draws(Path(), num_supernodes=sites, fraction_train=share, num_rounds=rounds, seed=seed, privacy__max_rounds=fewest)
    asked = [draws.in_round(r) for r in range(1, rounds + 1)]
    assert [len(set(numbers)) for numbers in asked] == [len(numbers) for numbers in asked] == [drawn] * rounds
    assert all(numbers == sorted(numbers) for numbers in asked)
    times = [sum(numbers.count(site) for numbers in asked) for site in range(sites)]
    assert max(times) <= fewest and max(times) - min(times) <= 1


def test_a_site_that_served_its_rounds_is_not_asked_again_though_the_others_are_gone(tmp_path: Path) -> None:
    draws = Draws(tmp_path, num_supernodes=3, num_rounds=3, fraction_train=0.34, privacy__max_rounds=1)
    (served,) = draws.in_round(1)
    draws.grid.here = [FIRST_NODE + served]
    assert draws.in_round(2) == []
    with pytest.raises(RunFailed, match="no site may serve another round"):
        draws.strategy.aggregate_train(2, [])


def test_another_seed_draws_other_sites(tmp_path: Path) -> None:
    drawn = set()
    for seed in range(5):
        spy = Spy()
        run_spied(
            small(
                tmp_path,
                run_name=f"seed-{seed}",
                seed=seed,
                num_rounds=1,
                num_supernodes=4,
                fraction_train=0.25,
                train__local_steps=1,
                privacy__epsilon=math.inf,
            ),
            spy,
        )
        drawn.add(spy.training(1)[0][0].metadata.dst_node_id)
    assert len(drawn) > 1


PRV_ERROR = 0.01


def opacus_epsilon(sigma: float, q: float, steps: int, delta: float) -> float:
    """Another accountant's bound, which holds its own error twice at most."""
    accountant = PRVAccountant()
    accountant.history = [(sigma, q, steps)]
    return float(accountant.get_epsilon(delta, eps_error=PRV_ERROR))


@pytest.mark.parametrize("overrides", [{}, {"data__partition": "dirichlet"}], ids=["iid", "dirichlet"])
def test_epsilon_is_the_largest_over_sites_of_what_their_steps_cost(
    overrides: dict[str, Any], finished: Callable[..., Finished]
) -> None:
    run = finished(**overrides)
    delta = run.settings.privacy.delta
    for line in run.metrics:
        steps = line["round"] * run.settings.train.local_steps
        sites = [reply.content["counters"] for _, reply in run.spy.training(line["round"])]
        assert [counters["steps"] for counters in sites] == [steps] * 3
        costs = [opacus_epsilon(c["noise-multiplier"], c["sample-rate"], steps, delta) for c in sites]
        assert max(costs) - 2 * PRV_ERROR < line["epsilon"] < max(costs)
    spent = [line["epsilon"] for line in run.metrics]
    assert spent == sorted(spent) and spent[0] > 0
    summary = run.summary
    assert spent[-1] == summary["epsilon"] == max(s["epsilon"] for s in summary["sites"].values())
    assert summary["epsilon"] <= run.settings.privacy.epsilon
    assert summary["epsilon"] > 0.97 * run.settings.privacy.epsilon
    steps = run.settings.num_rounds * run.settings.train.local_steps
    own = opacus_epsilon(summary["noise_multiplier"], summary["sample_rate"], steps, summary["delta"])
    assert own - 2 * PRV_ERROR < summary["epsilon"] < own


def test_the_epsilon_of_sites_that_failed_later_stays_in_the_maximum(tmp_path: Path) -> None:
    settings = small(tmp_path, data__partition="dirichlet", max_failures=2)
    first_only = Finished(run_spied(settings, spy := Spy(failing(0, 1, rounds=[2]))), settings, spy)
    before, after = (line["epsilon"] for line in first_only.metrics)
    assert after >= before
    assert first_only.summary["epsilon"] == max(s["epsilon"] for s in first_only.summary["sites"].values())
    assert {number: s["steps"] for number, s in first_only.summary["sites"].items()} == {"0": 4, "1": 4, "2": 4}  # as asked


def test_a_rejected_reply_was_released_and_its_steps_count(tmp_path: Path) -> None:
    settings = small(tmp_path, num_rounds=1)
    run = Finished(run_spied(settings, spy := Spy(lying(1, a_nan))), settings, spy)
    assert run.metrics[0]["failed_sites"].keys() == {"1"} and run.summary["sites"]["1"]["steps"] == 2


def test_the_rdp_accountant_reports_its_own_epsilon(finished: Callable[..., Finished]) -> None:
    summary = finished(privacy__accountant="rdp", num_rounds=1).summary
    assert summary["accountant"] == "rdp" and 0 < summary["epsilon"] <= 4.0
    prv = opacus_epsilon(summary["noise_multiplier"], summary["sample_rate"], 2, summary["delta"])
    assert prv < summary["epsilon"]


def test_dirichlet_sites_have_their_own_sample_rate_and_noise(finished: Callable[..., Finished]) -> None:
    run = finished(data__partition="dirichlet")
    sites = run.summary["sites"].values()
    assert len({s["sample_rate"] for s in sites}) == len({s["noise_multiplier"] for s in sites}) == 3
    records = [40 / s["sample_rate"] for s in sites]
    assert sum(records) == pytest.approx(1100) and all(n == pytest.approx(round(n)) for n in records)
    by_rate = sorted(sites, key=lambda s: s["sample_rate"])
    assert [s["noise_multiplier"] for s in by_rate] == sorted(s["noise_multiplier"] for s in sites)


def test_sample_rate_follows_from_the_batch_size_and_the_records(finished: Callable[..., Finished]) -> None:
    rates = [s["sample_rate"] for s in finished().summary["sites"].values()]
    assert rates == [40 / 367, 40 / 367, 40 / 366]


def test_without_privacy_everything_says_so(finished: Callable[..., Finished]) -> None:
    run = finished(privacy__epsilon=math.inf)
    assert run.summary["private"] is False and run.summary["epsilon"] is None and run.summary["noise_multiplier"] == 0
    assert [(line["private"], line["epsilon"]) for line in run.metrics] == [(False, None)] * 2
    assert "epsilon = inf" in (run.path / "config.toml").read_text()


def test_with_privacy_everything_says_so(finished: Callable[..., Finished]) -> None:
    run = finished()
    assert run.summary["private"] is True and all(line["private"] is True for line in run.metrics)


def test_a_run_says_everywhere_that_it_is_seeded(finished: Callable[..., Finished]) -> None:
    run = finished()
    assert run.summary["seeded"] is True and all(s["seeded"] is True for s in run.summary["sites"].values())
    assert all(line["seeded"] is True for line in run.metrics)


@pytest.mark.parametrize("overrides", [{}, {"privacy__epsilon": math.inf}], ids=["private", "non-private"])
def test_the_files_hold_what_other_tools_rely_on(overrides: dict[str, Any], finished: Callable[..., Finished]) -> None:
    run = finished(**overrides)
    assert set(run.summary) >= SUMMARY
    assert all(set(line) >= METRICS for line in run.metrics)
    assert [line["round"] for line in run.metrics] == [1, 2]
    assert (run.summary["strategy"], run.summary["seed"], run.summary["rounds"]) == ("la-lora", 0, 2)
    assert run.summary["accuracy"] == run.metrics[-1]["accuracy"]
    assert run.summary["versions"]["flwr"].startswith("1.41.")
    assert run.summary["peak_memory_mb"] > 100
    assert set(files_in(run.path)) >= {
        "config.toml",
        "metrics.jsonl",
        "summary.json",
        "checkpoint/adapter.safetensors",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        *("plots/accuracy.png", "plots/accuracy.svg", "plots/accuracy.pdf"),
        "flower.log",
    }
    assert (run.path / "plots" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert not [name for name in files_in(run.path) if ".part" in name]


def results(run: Finished) -> tuple[bytes, list[dict[str, Any]]]:
    lines = [{key: value for key, value in line.items() if key != "seconds"} for line in run.metrics]
    return (run.path / "adapter" / "adapter_model.safetensors").read_bytes(), lines


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path, finished: Callable[..., Finished]) -> None:
    settings, spy = small(tmp_path), Spy()
    first, again = finished(), Finished(run_spied(settings, spy), settings, spy)
    assert results(first) == results(again)
    other = finished(seed=1)
    assert results(other)[0] != results(first)[0]


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(tmp_path: Path, finished: Callable[..., Finished]) -> None:
    settings = small(tmp_path, num_rounds=1)
    run_spied(settings, Spy())
    before, spy = files_in(tmp_path), Spy()
    with pytest.raises(ConfigError, match=r"run-name = 'run': .* holds a run already"):
        run_spied(small(tmp_path, num_rounds=1, seed=5), spy)
    assert files_in(tmp_path) == before and not spy.exchange


def test_a_folder_that_holds_a_failed_run_is_refused_too(tmp_path: Path) -> None:
    stopped(small(tmp_path), Spy(failing(0, 1, 2)))
    before = files_in(tmp_path)
    with pytest.raises(ConfigError, match="holds a run already"):
        run_spied(small(tmp_path), Spy())
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("strategy", ["la-lora", "ffa-lora"])
def test_peft_loads_the_adapter_of_a_run_and_gets_its_accuracy(
    strategy: str, head: str, finished: Callable[..., Finished]
) -> None:
    run = finished(strategy=strategy, lora__head=head)
    images, labels = public_test_part()
    base = build_vit_digits()
    with torch.inference_mode():
        frozen = base(images)
        loaded = PeftModel.from_pretrained(base, str(run.path / "adapter")).eval()(images)
    model = servers_learner(run.settings).adapter.model
    values = {name: run.checkpoint.get(plain(name)) for name, _ in model.named_parameters()}
    assert len(run.checkpoint) == sum(value is not None for value in values.values())
    model.load_state_dict({name: value for name, value in values.items() if value is not None}, strict=False)
    with torch.inference_mode():
        checkpointed = model.eval()(images)
    torch.testing.assert_close(loaded, checkpointed, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(loaded, frozen, atol=1e-2)
    right = int((loaded.argmax(-1) == labels).sum())
    assert run.summary["accuracy"] == pytest.approx(right / len(labels), abs=1e-9)
    assert run.summary["frozen_accuracy"] == pytest.approx(float((frozen.argmax(-1) == labels).float().mean()), abs=1e-6)
    loss = float(torch.nn.functional.cross_entropy(loaded, labels))
    assert run.summary["loss"] == pytest.approx(loss, rel=1e-4)


def plain(name: str) -> str:
    """PEFT's name of a parameter in a file, from its name in the model."""
    return name.replace(".modules_to_save.default", "").replace(".default", "")


def test_the_adapter_folder_holds_the_checkpoint_and_the_settings(finished: Callable[..., Finished]) -> None:
    run = finished(lora__head="trained")
    config = strict_json((run.path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 4.0, ["attn.qkv"])
    saved = load_file(run.path / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == run.checkpoint.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in run.checkpoint.items())


def test_on_round_gets_each_line_as_it_is_written(tmp_path: Path) -> None:
    from lalora_flwr.engines.inline import run_inline

    told: list[RoundMetrics] = []

    def on_round(line: RoundMetrics) -> None:
        assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == line.round
        told.append(line)

    path = run_inline(small(tmp_path, privacy__epsilon=math.inf), on_round)
    written = [strict_json(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [{**line.to_json(), "epsilon": None} for line in told] == written
