"""A server that steers a run by directives and changes what never trains: it gains no more than what the ledger charges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from lalora_flwr.adapter.lora_residual import LORA_D
from lalora_flwr.adapter.lora_sb import LORA_R
from lalora_flwr.adapter.slots import Layout, Mask
from lalora_flwr.methods.schedules import Schedule
from lalora_flwr.settings.choices import SCHEDULES
from lalora_flwr.wire.public import Public
from tests.adapters import factor_of
from tests.attacks.attacker import RECORDS, RUN, Site, table, text_model
from tests.attacks.orders import order
from tests.attacks.problems import problems
from tests.attacks.test_malicious_server import HUGE, Attack, Target

LAYER = "bert.encoder.layer.{}.attention.self.query"
SIZES = [1e-45, 1.0, 1e4, HUGE, float("nan")]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("site")
    model = text_model(folder / "model")
    whole, without = table(folder / "with.csv"), table(folder / "without.csv", RECORDS[:-1])
    return Target(model, Site(whole, model), Site(without, model))


def as_lora(directive: Any, **run: Any) -> Attack:
    return Attack({"strategy": "as-lora", **run}, {"directive": directive})


@pytest.mark.parametrize(("chosen", "steps"), [([], 1), ([0], 3), ([0, 1], 1)])
def test_any_choice_of_factors_is_answered_within_the_ledgers_charge(chosen: list[int], steps: int, target: Target) -> None:
    directive = {"A": [LAYER.format(number) for number in chosen]}
    attack = as_lora(directive, **{"train.local-steps": steps})
    assert attack.problems(target) == []
    message = order({**RUN, **attack.run}, target.model, directive=directive)
    served = target.whole.serve(message, {**RUN, **attack.run})
    trained = {name.split(".lora_")[0].removeprefix("base_model.model."): factor_of(name) for name in served.tensors}
    assert not served.reason and trained == {LAYER.format(n): "A" if n in chosen else "B" for n in (0, 1)}


@pytest.mark.parametrize(
    "directive",
    [
        {},
        {"A": "all"},
        {"A": None},
        {"A": {}},
        {"A": [LAYER.format(1), LAYER.format(0)]},
        {"A": [LAYER.format(0)] * 2},
        {"A": [LAYER.format(7)]},
        {"A": [["x"]]},
        {"A": [0]},
        {"A": [], "B": []},
        {"B": []},
        {"A": [], "lr": 1e30},
        {"a": []},
    ],
)
def test_any_other_directive_is_refused_and_counts_nothing(directive: Any, target: Target) -> None:
    attack = as_lora(directive)
    served = target.whole.serve(order({**RUN, **attack.run}, target.model, **attack.fields), {**RUN, **attack.run})
    assert served.reason.startswith("order: ") and not served.reserved


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("strategy", ["fedex-lora", "fed-sb"])
def test_whatever_the_server_makes_of_the_frozen_weights_the_noise_stays(strategy: str, size: float, target: Target) -> None:
    """A residual and fixed factors are the server's to choose, as factors are."""
    assert Attack({"strategy": strategy}, adapter=("everything", size)).problems(target) == []


@pytest.mark.parametrize("size", SIZES)
def test_a_preconditioner_of_any_size_is_post_processing(size: float, target: Target) -> None:
    run = {"strategy": "dp-lora", "filter.name": "precondition", "train.local-steps": 2}
    assert Attack(run, adapter=("everything", size)).problems(target) == []


def answered(strategy: str, target: Target) -> dict[str, str]:
    """The parts that come back of an honest order, by slot."""
    run = {**RUN, "strategy": strategy}
    served = target.whole.serve(message_of(run, target.model), run)
    assert not served.reason and len(served.steps) == 1
    return {name: name.rpartition(".lora_")[2][0] for name in served.tensors}


def message_of(run: dict[str, Any], model: Path) -> Message:
    return order(run, model)


def test_what_never_trains_does_not_come_back(target: Target) -> None:
    assert set(answered("fedex-lora", target).values()) == {"A", "B"}
    assert set(answered("fed-sb", target).values()) == {"R"}
    assert (LORA_D, LORA_R) == ("lora_D", "lora_R")


class Everything(Schedule):
    """As a package might have it that knows of no slot that never trains."""

    text, period = "test-everything", 1

    def mask(self, layout: Layout, server_round: int, step: int, directive: Public) -> Mask:
        return layout.names


SCHEDULES.register("test-everything", Everything())


def test_a_schedule_of_another_package_cannot_train_what_is_frozen(target: Target) -> None:
    """Nothing checks before training that the gradients of such a slot are those of single records."""
    run = {**RUN, "strategy": "fedex-lora", "lora.schedule": "test-everything"}
    assert problems(message_of(run, target.model), run, target.whole, target.without) == []
    served = target.whole.serve(message_of(run, target.model), run)
    assert served.reason.startswith("order: a step would train nothing, or what") and not served.reserved
