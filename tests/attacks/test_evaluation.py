"""Accuracy on a site's own records: an answer that is worth ε like any other (hole 9)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from lalora_flwr.ledger.file import create
from lalora_flwr.wire.orders import ARRAYS, CONFIG
from lalora_flwr.wire.replies import SITE_METRICS
from tests.attacks.attacker import RECORDS, RUN, Site, reserved_in, table, text_model
from tests.attacks.orders import order
from tests.sites import REAL

EVALUATING = {**RUN, "evaluate-sites": True}
OPEN = {"allow-evaluation": True, "evaluation-noise": 2.0, "max-epsilon": 3.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("model") / "model")


class Asked:
    """A real site whose ledger goes on from question to question."""

    def __init__(self, site: Site, ledger: Path, run: dict[str, Any] = EVALUATING) -> None:
        self.site, self.ledger, self.run = site, ledger, run
        if not ledger.exists():
            create(ledger)

    def evaluate(
        self, run_id: int = 1, server_round: int = 1, change: Callable[[Any], Any] = lambda state: state, **fields: Any
    ) -> Message:
        train = order(self.run, Path(self.site.model), change, server_round=server_round)
        said = {"server-round": server_round, "model-digest": train.content[CONFIG]["model-digest"], "own": "", **fields}
        content = RecordDict({ARRAYS: train.content[ARRAYS], CONFIG: ConfigRecord(said)})
        message = Message(content, dst_node_id=7, message_type="evaluate")
        return REAL(message, Context(run_id, 7, self.site.owner(self.ledger), RecordDict(), dict(self.run)))


def own(folder: Path, model: Path, name: str = "records", **node_config: Any) -> Site:
    return Site(table(folder / f"{name}.csv"), model, {**OPEN, **node_config})


def test_questions_without_end_find_an_end(model: Path, tmp_path: Path) -> None:
    """Hole 9: once allowed, a server could ask for the exact accuracy as often as it liked, of any adapter, for nothing."""
    asked = Asked(own(tmp_path, model), tmp_path / "ledger")
    replies = [asked.evaluate(run_id) for run_id in range(1, 25)]
    answered = [reply for reply in replies if not reply.has_error()]
    counted = reserved_in(asked.ledger)
    assert 0 < len(answered) < len(replies)
    assert len(counted) >= len(answered)
    assert all(entry.epsilon <= 3.0 for entry in counted)


def test_an_answer_is_counted_and_noised(model: Path, tmp_path: Path) -> None:
    """Hole 9: two answers to one question differ, and each is in the ledger."""
    asked = Asked(own(tmp_path, model, **{"max-epsilon": 20.0}), tmp_path / "ledger")
    answers = []
    for run_id in range(1, 9):
        before = len(reserved_in(asked.ledger))
        reply = asked.evaluate(run_id)
        assert len(reserved_in(asked.ledger)) == before + (not reply.has_error())
        if not reply.has_error():
            answers.append(dict(reply.content[SITE_METRICS]))
    assert len(answers) > 1 and len({answer["accuracy"] for answer in answers}) > 1
    assert all("loss" not in answer for answer in answers)  # a mean of raw losses has no bound
    assert all(0 <= answer["accuracy"] <= 1 for answer in answers)


@pytest.mark.parametrize("noise", [None, 0.01])
def test_without_enough_noise_there_is_no_answer(noise: float | None, model: Path, tmp_path: Path) -> None:
    """Hole 9: an owner who allows evaluation and names no noise, or hardly any, has not allowed exact answers."""
    changed = {} if noise is None else {"evaluation-noise": noise}
    site = Site(table(tmp_path / "records.csv"), model, {"allow-evaluation": True, "max-epsilon": 3.0, **changed})
    reply = Asked(site, tmp_path / "ledger").evaluate()
    assert reply.has_error() or "noise-multiplier" in reply.content[SITE_METRICS]


def test_whether_a_site_evaluates_does_not_depend_on_its_records(model: Path, tmp_path: Path) -> None:
    """Holes 3 and 9: a site without a usable record answers and counts as the others."""
    sites = [own(tmp_path, model), own(tmp_path, model, "none")]
    table(tmp_path / "none.csv", [(text, "excellent") for text, _ in RECORDS])
    told = []
    for number, site in enumerate(sites):
        asked = Asked(site, tmp_path / f"ledger-{number}")
        reply = asked.evaluate()
        error = reply.error.reason if reply.has_error() else ""
        told.append((error, [(r.sigma, r.q, r.steps) for r in reserved_in(asked.ledger)]))
    assert told[0] == told[1]
    assert told[0][1]


def test_training_and_evaluation_share_one_budget(model: Path, tmp_path: Path) -> None:
    """Hole 9: what was spent on evaluation is spent for training."""
    site, ledger = own(tmp_path, model, **{"evaluation-noise": 4.0}), tmp_path / "ledger"
    asked = Asked(site, ledger)
    for run_id in range(1, 30):
        asked.evaluate(run_id)
    assert len(reserved_in(ledger)) > 1
    served = site.serve(order(RUN, model), RUN, ledger=ledger, watch=False, run_id=99)  # at less noise than an evaluation
    assert served.reason.startswith("budget: ")


def test_a_site_that_does_not_allow_it_counts_nothing(model: Path, tmp_path: Path) -> None:
    """Hole 9: a refusal is free and the same for all."""
    site = Site(table(tmp_path / "records.csv"), model)
    asked = Asked(site, tmp_path / "ledger")
    reply = asked.evaluate()
    assert reply.has_error() and reserved_in(asked.ledger) == []


def test_any_adapter_may_be_asked_about_and_costs_the_same(model: Path, tmp_path: Path) -> None:
    """Hole 9: a server that chooses the adapter asks what it likes; the charge does not depend on what it asks."""
    asked = Asked(own(tmp_path, model), tmp_path / "ledger")
    first = asked.evaluate(1)
    second = asked.evaluate(1, 2, change=lambda state: {name: 1e4 * tensor + 1 for name, tensor in state.items()})
    assert not second.has_error()
    assert asked.evaluate(1, 3, **{"adapter-digest": "0" * 64}).error.reason == "order: its values are not the declared ones"
    counted = reserved_in(asked.ledger)
    assert len(counted) == (not first.has_error()) + (not second.has_error())
    assert len({(entry.sigma, entry.q, entry.steps) for entry in counted}) == 1
