"""A base in four bits under a hostile server: each record alone, clip and noise as for any other."""

from __future__ import annotations

from typing import Any

import pytest

from lalora_flwr.models.four_bits import BLOCK
from tests.attacks.attacker import RECORDS, RUN, Site, table, text_model
from tests.attacks.orders import order
from tests.attacks.test_malicious_server import HUGE, Attack, Target

RUNS: dict[str, dict[str, Any]] = {
    "one step": {"strategy": "ffa-lora"},
    "both factors, in two passes a step": {"strategy": "dp-lora", "filter.name": "kalman", "train.local-steps": 3},
    "A clipped apart": {"strategy": "dp-lora", "privacy.clipping": "apart", "privacy.clip-norm": 0.01, "lora.alpha": 1000.0},
    "the frozen weights changed": {"strategy": "flora", "train.local-steps": 2},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("site")
    model = text_model(folder / "model", hidden_size=BLOCK, intermediate_size=BLOCK)  # narrower layers are not packed
    whole, without = table(folder / "with.csv"), table(folder / "without.csv", RECORDS[:-1])
    return Target(model, Site(whole, model), Site(without, model))


def in_four_bits(run: str) -> dict[str, Any]:
    return {**RUNS[run], "model.dtype": "nf4"}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("adapter", [("initial", 1.0), ("everything", 3.0), ("everything", 1e4), ("one", 1e30), ("A", HUGE)])
def test_whatever_is_sent_the_answer_is_worth_what_the_ledger_charged(
    run: str, adapter: tuple[str, float], target: Target
) -> None:
    assert Attack(in_four_bits(run), adapter=adapter).problems(target, seed=3) == []


@pytest.mark.parametrize("run", RUNS)
def test_an_honest_run_is_answered(run: str, target: Target) -> None:
    """Else the attacks above would pass on a site that refuses everything."""
    asked = {**RUN, **in_four_bits(run)}
    served = target.whole.serve(order(asked, target.model), asked)
    assert not served.reason and len(served.steps) == served.reserved[0].steps
