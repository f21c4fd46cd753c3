"""What a plan predicts, the run then costs; and planning looks at no record."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lalora_flwr.data import digits
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.server.plan import make_plan
from lalora_flwr.wire.orders import ARRAYS
from lalora_flwr.wire.tensors import num_bytes
from tests.conftest import Finished, small
from tests.sites import servers_learner


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to a record raises."""

    def touched(*_: Any) -> Any:
        raise AssertionError("a record was touched")

    monkeypatch.setattr(digits, "all_records", touched)


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_planning_looks_at_no_record(partition: str, tmp_path: Path) -> None:
    plan = make_plan(small(tmp_path, data__partition=partition))
    assert plan.records == 366 and plan.mechanism.noise_multiplier > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_the_planned_noise_is_the_runs(accountant: str, finished: Callable[..., Finished]) -> None:
    run = finished(num_supernodes=2, privacy__accountant=accountant)  # an even split: all sites are alike
    plan, summary = make_plan(run.settings), run.summary
    assert plan.mechanism.noise_multiplier == summary["noise_multiplier"]
    assert plan.mechanism.sample_rate == summary["sample_rate"] == 40 / 550
    assert plan.mechanism.clip_norm == summary["clip_norm"]


def test_in_an_uneven_split_the_plan_is_for_the_site_with_the_most_noise(finished: Callable[..., Finished]) -> None:
    run = finished()
    plan, sites = make_plan(run.settings), run.summary["sites"]
    assert plan.mechanism.noise_multiplier == max(s["noise_multiplier"] for s in sites.values())
    assert (plan.mechanism.noise_multiplier, plan.mechanism.sample_rate) == (
        sites["2"]["noise_multiplier"],
        sites["2"]["sample_rate"],
    )


def test_the_predicted_epsilon_is_the_runs_round_by_round(finished: Callable[..., Finished]) -> None:
    run = finished(num_supernodes=4)  # sites of one size: others calibrate a noise of their own
    plan = make_plan(run.settings)
    for line in run.metrics:
        assert plan.epsilon_after(line["round"], run.settings) == pytest.approx(line["epsilon"], abs=1e-9)
    assert plan.steps == 4 == max(s["steps"] for s in run.summary["sites"].values())


def test_a_limit_on_rounds_shrinks_the_noise_and_caps_the_prediction(tmp_path: Path) -> None:
    run: dict[str, Any] = {"num_rounds": 4, "num_supernodes": 4, "fraction_train": 0.5, "privacy__accountant": "rdp"}
    free, limited = small(tmp_path, **run), small(tmp_path, **run, privacy__max_rounds=2)
    wide, tight = make_plan(free), make_plan(limited)
    assert (wide.steps, tight.steps) == (8, 4)
    assert tight.mechanism.noise_multiplier < wide.mechanism.noise_multiplier
    assert tight.epsilon_after(2, limited) == tight.epsilon_after(4, limited) <= limited.privacy.epsilon


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("strategy", ["la-lora", "dp-lora", "ffa-lora", "rolora"])
def test_planned_bytes_are_the_runs(strategy: str, head: str, finished: Callable[..., Finished]) -> None:
    run = finished(strategy=strategy, lora__head=head)
    plan = make_plan(run.settings)
    for line, up in zip(run.metrics, plan.bytes_up, strict=True):
        assert line["bytes_down"] == plan.bytes_down * line["sites"]
        assert line["bytes_up"] == up * line["sites"]


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy": "hetlora", "profiles": "rank=1;;layers=1"},
        {"strategy": "hlora", "profiles": "rank=1 layers=1;rank=2", "lora__schedule": "round:BA", "lora__head": "trained"},
        {"strategy": "flora", "profiles": "rank=1;", "privacy__accountant": "rdp"},
        {"strategy": "hetlora", "profiles": "steps=1;;", "lora__schedule": "step:BA"},
        {"strategy": "la-lora", "profiles": "batch=3;"},
    ],
    ids=str,
)
def test_planned_bytes_of_each_profile_are_the_runs(keys: dict[str, Any], finished: Callable[..., Finished]) -> None:
    """Those of each site, as its messages are, and their sum, as the metrics say it."""
    run = finished(**keys)
    kinds = {kind.profile: kind for kind in make_plan(run.settings).traffic}
    assert sum(kind.sites for kind in kinds.values()) == 3
    sites = [kinds[run.settings.words_of(site)] for site in range(3)]
    for line, place in zip(run.metrics, (0, 1), strict=True):
        for kind, (order, reply) in zip(sites, run.spy.training(line["round"]), strict=True):
            sizes = [num_bytes(message.content.array_records[ARRAYS]) for message in (order, reply)]
            assert [kind.down, kind.up[place]] == sizes
        assert line["bytes_down"] == sum(kind.down for kind in sites)
        assert line["bytes_up"] == sum(kind.up[place] for kind in sites)


def test_a_weak_site_sends_and_receives_less(tmp_path: Path) -> None:
    weak, whole, short = make_plan(small(tmp_path, strategy="hetlora", profiles="rank=1;;layers=1")).traffic
    assert weak.down < whole.down == short.down
    assert weak.up[0] < whole.up[0] and short.up[0] < whole.up[0]
    plan = make_plan(small(tmp_path, strategy="hetlora", profiles="rank=1;;layers=1", num_supernodes=8))
    assert [kind.sites for kind in plan.traffic] == [3, 3, 2] and plan.bytes_down == whole.down


@pytest.mark.parametrize(("strategy", "trained"), [("la-lora", {"A", "B"}), ("ffa-lora", {"B"}), ("rolora", {"A", "B"})])
def test_planned_parameters_are_those_that_train(strategy: str, trained: set[str], tmp_path: Path) -> None:
    settings = small(tmp_path, strategy=strategy)
    plan, adapter = make_plan(settings), servers_learner(settings).adapter
    sizes = {name: tensor.numel() for name, tensor in adapter.state().items()}
    assert plan.trainable == sum(size for name, size in sizes.items() if name.split(".lora_")[1][0] in trained)
    assert plan.trainable + plan.frozen == sum(p.numel() for p in adapter.model.parameters())


def test_without_privacy_there_is_no_noise_and_no_bound(tmp_path: Path) -> None:
    settings = small(tmp_path, privacy__epsilon=math.inf)
    plan = make_plan(settings)
    assert plan.mechanism.noise_multiplier == 0 and plan.epsilon_after(1, settings) == math.inf


def test_overrides_of_schedule_and_filter_are_planned(tmp_path: Path) -> None:
    own = make_plan(small(tmp_path))
    assert (own.schedule, own.filter) == ("step:BA", "gauss5")
    other = make_plan(small(tmp_path, lora__schedule="step:BBA", filter__name="none"))
    assert (other.schedule, other.filter) == ("step:BBA", "none")


def test_more_sites_than_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num-supernodes = 1101: more sites than the 1100 records"):
        make_plan(small(tmp_path, num_supernodes=1101))
