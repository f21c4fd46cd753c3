"""What trains is not LoRA: every form is clipped and noised as a whole, whatever adapter a server sends."""

from __future__ import annotations

from typing import Any

import pytest

from tests.attacks.attacker import RECORDS, RUN, Site, table, text_model
from tests.attacks.orders import order
from tests.attacks.test_malicious_server import HUGE, Attack, Target

FORMS = ["bitfit", "bottleneck", "soft-prompt", "head-only", "fed-sb", "fedex-lora"]
SIZES = [1e-45, 1e4, HUGE, float("nan")]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("site")
    model = text_model(folder / "model")
    whole, without = table(folder / "with.csv"), table(folder / "without.csv", RECORDS[:-1])
    return Target(model, Site(whole, model), Site(without, model))


def asked(strategy: str, **more: Any) -> dict[str, Any]:
    size = {"lora.size": 3} if {strategy, more.get("lora.form")} & {"bottleneck", "soft-prompt"} else {}
    return {
        "strategy": strategy,
        "lora.rank": 4,
        "lora.alpha": 8.0,
        "lora.targets": "auto",
        "data.max-tokens": 36,
        **size,
        **more,
    }


@pytest.mark.parametrize("strategy", FORMS)
def test_a_form_is_served_and_costs_what_the_ledger_says(strategy: str, target: Target) -> None:
    run = {**RUN, **asked(strategy)}
    served = target.whole.serve(order(run, target.model), run)
    assert not served.reason and served.tensors
    for more in ({}, {"train.local-steps": 3}, {"privacy.clip-norm": 1e-36}, {"train.optimizer": "adamw"}):
        assert Attack(asked(strategy, **more)).problems(target) == []


@pytest.mark.parametrize("strategy", FORMS)
def test_no_adapter_that_a_server_sends_switches_the_noise_off(strategy: str, target: Target) -> None:
    for size in SIZES:
        for kind in ("everything", "one"):
            assert Attack(asked(strategy), adapter=(kind, size)).problems(target) == [], (size, kind)


@pytest.mark.parametrize("form", ["bitfit", "soft-prompt", "head"])
def test_who_allows_a_strategy_has_not_allowed_another_form_under_its_name(form: str, target: Target) -> None:
    run = {**RUN, **asked("dp-lora", **{"lora.form": form})}
    message = order(run, target.model)
    assert not target.whole.serve(message, run).reason
    for allowed, reason in (("dp-lora", "cap: the site does not allow the run's form"), (f"dp-lora,{form}", "")):
        own = {"allowed-strategies": "dp-lora"} | ({"allowed-forms": f"lora,{form}"} if not reason else {})
        served = Site(target.whole.data, target.model, own).serve(message, run)
        assert served.reason == reason, allowed
        assert bool(served.reserved) == (not reason)
