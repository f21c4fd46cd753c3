"""A real site serves a round: its owner's caps come first, and its ledger file counts before anything is released."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context
from flwr.supercore.task_identity import TaskIdentity

from lalora_flwr.data.records import Subset
from lalora_flwr.ground.errors import LedgerError
from lalora_flwr.ledger import file as ledger_file
from lalora_flwr.ledger.entries import Commit, Reserve
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.ledger.site_ledger import SiteLedger
from lalora_flwr.ledger.verify import verify
from lalora_flwr.privacy.accounting import epsilon_spent
from lalora_flwr.privacy.mechanism import Mechanism, PrivateSum
from lalora_flwr.settings import Settings
from lalora_flwr.site.records import RecordStore
from lalora_flwr.wire.replies import COUNTERS
from tests.conftest import small
from tests.ledger.site_ledgers import owned, steps_in
from tests.site.failures import FIXED, SECRET, FailsAt, Heard, Untouchable, raising
from tests.sites import REAL as app
from tests.sites import real_app, virtual_app
from tests.sites import train_order as order

LEDGER_FAULT = "ledger: the site cannot use it; its own log says why"
MakeReal = Callable[..., Context]


@pytest.fixture(autouse=True)
def _stamps() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # Flower stamps messages with them


@pytest.fixture
def real(context: Callable[[Settings], Context], tmp_path: Path) -> MakeReal:
    return lambda settings, **changed: owned(context(settings), tmp_path, **changed)


@pytest.fixture
def own() -> Iterator[Heard]:
    """What the site's own log says."""
    logger, added = logging.getLogger("lalora_flwr.site"), Heard()
    logger.addHandler(added)
    yield added
    logger.removeHandler(added)


def test_a_real_site_counts_in_its_own_file_by_its_declared_number_of_records(tmp_path: Path, real: MakeReal) -> None:
    settings = small(tmp_path)
    for server_round in (1, 2):  # as Flower does it: a new process, here at least a new context, for each message
        held = real(settings, run_id=2**63 + 1, **{"num-records": 800})
        counters = app(order(settings, server_round), held).content[COUNTERS]
        assert not held.state
        spent = epsilon_spent([(counters["noise-multiplier"], 40 / 800, 2 * server_round)], 1e-4, settings.privacy.accountant)
        assert (counters["steps"], counters["sample-rate"], counters["epsilon"]) == (2 * server_round, 0.05, spent)
    first, _, second, commit = LedgerFile(str(held.node_config["ledger-path"])).read().entries[1:]
    assert isinstance(first, Reserve) and isinstance(second, Reserve) and isinstance(commit, Commit)
    assert (first.run, first.strategy, first.round, first.schedule) == (str(2**63 + 1), "la-lora", 1, "step:BA")
    assert (first.q, first.clip_norm, first.steps, first.dataset) == (0.05, 1.0, 2, "default")
    assert (second.max_epsilon, second.delta, second.accountant) == (50.0, 1e-3, "pld")
    assert second.epsilon == epsilon_spent([(second.sigma, 0.05, 4)], 1e-3)
    assert second.fingerprint == first.fingerprint
    verify(LedgerFile(str(held.node_config["ledger-path"])))


def test_the_true_number_of_records_decides_nothing_that_leaves(tmp_path: Path, real: MakeReal) -> None:
    made: list[Mechanism] = []
    store, settings = RecordStore(), small(tmp_path)

    def noted(mechanism: Mechanism, *more: Any) -> PrivateSum:
        made.append(mechanism)
        return PrivateSum(mechanism, *more)

    assert not real_app(make_sum=noted)(order(settings), real(settings)).has_error()
    seven = real_app(make_sum=noted, records=lambda *args: Subset(store(*args), torch.arange(7)))
    assert not seven(order(settings), real(settings)).has_error()
    assert len(made) == 4 and len(set(made)) == 1 and made[0].expected_batch == pytest.approx(40)


def test_the_noise_is_calibrated_once_in_a_run(tmp_path: Path, real: MakeReal) -> None:
    """The ledger keeps what was found: a σ that nobody would calibrate, put there, is what the site takes."""
    settings = small(tmp_path)
    first = app(order(settings), real(settings)).content[COUNTERS]["noise-multiplier"]
    held = real(settings, run_id=2)
    ledger = LedgerFile(str(held.node_config["ledger-path"]))
    known = [entry.sigma for entry in ledger.read().entries if isinstance(entry, Reserve)]
    assert known == [first]
    assert app(order(settings, 2), held).content[COUNTERS]["noise-multiplier"] == first


NOWHERE = "/nowhere/records.csv"


def untouchable() -> Any:
    """A site at which the test ends if anything looks at its model or its records."""
    return real_app(learners=Untouchable(), records=lambda *_: pytest.fail("the records were read"))


@pytest.mark.parametrize(
    ("asked", "caps", "reason"),
    [
        ({}, {"allowed-strategies": "ffa-lora,rolora"}, "cap: the site does not allow this strategy"),
        ({}, {"max-epsilon": 3.9}, "cap: the run's privacy.epsilon is above the site's max-epsilon"),
        ({"privacy__epsilon": float("inf")}, {}, "cap: the run's privacy.epsilon is above the site's max-epsilon"),
        ({}, {"delta": 1e-5}, "cap: the run's privacy.delta is above the site's delta"),
        ({}, {"max-steps-per-round": 1}, "cap: the run's train.local-steps are above the site's max-steps-per-round"),
        ({}, {"min-noise-multiplier": 9.0}, "cap: the run's noise multiplier is below the site's min-noise-multiplier"),
        ({}, {"max-epsilon": None}, "node-config: max-epsilon must be a number above 0"),
        ({}, {"max-epsilom": 3.0}, "node-config: a key is unknown; the site's own log names it"),
        ({}, {"ledger-path": "/nowhere/ledger"}, LEDGER_FAULT),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_the_owner_does_not_allow_is_refused_before_anything_is_read(
    asked: dict[str, Any], caps: dict[str, Any], reason: str, tmp_path: Path, real: MakeReal
) -> None:
    message = order(settings := small(tmp_path, **asked))
    held = real(settings, **caps)
    held.node_config["data-path"] = NOWHERE
    assert untouchable()(message, held).error.reason == reason
    assert not Path("/nowhere").exists()


@pytest.mark.parametrize("changed", [{"directive": {"mask": []}}, {"exchange": {"sites": [1]}}], ids=lambda c: next(iter(c)))
def test_an_order_that_is_not_the_methods_own_costs_nothing(changed: dict[str, Any], tmp_path: Path, real: MakeReal) -> None:
    settings = small(tmp_path)
    held = real(settings)
    site = real_app(records=lambda *_: pytest.fail("the records were read"))
    reason = "order: its directive or its exchange is not one of the run's method"
    assert site(order(settings, **changed), held).error.reason == reason
    assert steps_in(held) == 0


def test_a_schedule_that_the_settings_override_openly_is_the_strategys(tmp_path: Path, real: MakeReal) -> None:
    settings = small(tmp_path, lora__schedule="step:AB", filter__name="none")
    assert not app(order(settings), real(settings, **{"allowed-strategies": "la-lora"})).has_error()


def test_a_spent_budget_is_refused_before_anything_is_read_whoever_asks(tmp_path: Path, real: MakeReal) -> None:
    settings, tight = small(tmp_path), {"max-epsilon": 4.0, "delta": 1e-4}
    for server_round in (1, 2):
        assert not app(order(settings, server_round), real(settings, **tight)).has_error()
    message, held = order(settings), real(settings, run_id=2, **tight)
    before = Path(str(held.node_config["ledger-path"])).read_bytes()
    assert untouchable()(message, held).error.reason == "budget: the site's records have no epsilon left for this round"
    assert Path(str(held.node_config["ledger-path"])).read_bytes() == before
    assert steps_in(held) == 4


@pytest.mark.parametrize("step", [0, 2])
def test_on_a_real_site_a_round_that_fails_counts_in_full(step: int, tmp_path: Path, real: MakeReal) -> None:
    settings = small(tmp_path, train__local_steps=3)
    held = real(settings)
    assert real_app(make_sum=FailsAt(step))(order(settings), held).error.reason == FIXED
    assert steps_in(held) == 3


@pytest.mark.parametrize("fault", ["missing", "tampered", "locked", "another file"])
def test_a_ledger_that_cannot_be_used_means_no_training_and_details_only_in_the_own_log(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real: MakeReal, own: Heard
) -> None:
    settings = small(tmp_path)
    held = real(settings)
    path = Path(str(held.node_config["ledger-path"]))
    monkeypatch.setattr(ledger_file, "BUSY_SECONDS", 0.1)
    message, other = order(settings), sqlite3.connect(path, isolation_level=None)
    match fault:
        case "missing":
            path.unlink()
        case "tampered":
            other.execute("DROP TRIGGER no_update")
            other.execute("UPDATE entries SET body = replace(body, '1', '2')")
        case "locked":
            other.execute("BEGIN IMMEDIATE")
        case _:
            path.write_text(SECRET)
    reply = real_app(make_sum=lambda *_: pytest.fail("trained"))(message, held)
    other.close()
    assert reply.error.reason == LEDGER_FAULT
    assert str(path) in own.text


def test_a_ledger_that_fails_at_commit_sends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real: MakeReal) -> None:
    monkeypatch.setattr(SiteLedger, "commit", raising(LedgerError("full")))
    held = real(settings := small(tmp_path))
    reply = app(order(settings), held)
    assert reply.error.reason == LEDGER_FAULT and not reply.has_content()
    assert steps_in(held) == 2


def test_a_resumed_run_tells_the_epsilon_of_all_its_rounds(tmp_path: Path, real: MakeReal) -> None:
    settings = small(tmp_path)
    whole = [app(order(settings, r, counted_steps=2 * (r - 1)), real(settings, run_id=r)) for r in (1, 2)]
    assert [reply.content[COUNTERS]["steps"] for reply in whole] == [2, 4]
    assert whole[1].content[COUNTERS]["epsilon"] == pytest.approx(4.0, abs=0.05)
    assert steps_in(real(settings)) == 4


def test_a_simulated_site_with_a_ledger_keeps_it_like_a_real_one(tmp_path: Path, real: MakeReal) -> None:
    app = virtual_app()
    held = real(settings := small(tmp_path))
    reply = app(order(settings), held)
    assert reply.content[COUNTERS]["seeded"] == 1 and steps_in(held) == 2
    assert app(order(settings), real(settings, **{"max-epsilon": 0.1})).error.reason.startswith("cap: ")


def test_every_run_with_records_of_one_share_finds_the_name_they_have(tmp_path: Path, real: MakeReal) -> None:
    settings = small(tmp_path)
    assert not app(order(settings), real(settings, dataset="a")).has_error()
    refused = app(order(settings), real(settings, dataset="b"))
    assert refused.error.reason == "dataset: the site's records are in its ledger under another name"


def test_a_declared_number_of_records_far_from_the_truth_is_told_to_the_owner_only(
    tmp_path: Path, real: MakeReal, own: Heard
) -> None:
    settings = small(tmp_path)
    assert not app(order(settings), real(settings, **{"num-records": 90})).has_error()
    assert "num-records = 90" in own.text
