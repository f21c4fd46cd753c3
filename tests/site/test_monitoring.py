"""The owner's file: ε and rounds as the ledger has them, refusals and seconds as the server sees them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from lalora_flwr.ground.errors import LedgerError, SiteRefusal
from lalora_flwr.ground.prometheus import Labels, samples_of
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.ledger.site_ledger import SiteLedger
from lalora_flwr.site.app import answer
from lalora_flwr.site.monitoring import noted, refreshed
from lalora_flwr.site.resident.words import FAILURE, Told
from tests.conftest import small
from tests.ledger.site_ledgers import DELTA, compose, new_ledger, request, serve, session
from tests.site.failures import FailsAt, Heard, MakeReal, raising
from tests.sites import REAL as app
from tests.sites import real_app
from tests.sites import train_order as order


def short(name: str, of: Labels) -> str:
    return of[-1][1] if name.endswith("refusals_total") else name.removeprefix("lalora_site_")


def values(path: Path) -> dict[str, float]:
    """All values by name; of several with a label each, by the label."""
    return {short(name, of): value for (name, of), value in samples_of(path.read_text()).items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site.prom"


def ledger_of(context: Context) -> LedgerFile:
    return LedgerFile(str(context.node_config["ledger-path"]))


def test_a_site_says_what_its_ledger_says(tmp_path: Path, path: Path, real: MakeReal) -> None:
    settings = small(tmp_path)
    for server_round in (1, 2):
        held = real(settings, **{"metrics-path": str(path), "alert-epsilon": 0.001})
        assert not app(order(settings, server_round), held).has_error()
    entry = ledger_of(held).read().entries[-2]
    found = values(path)
    assert found["epsilon_spent"] == entry.epsilon and found["epsilon_left"] == 50.0 - entry.epsilon  # type: ignore[union-attr]
    counted = ("rounds_total", "messages_total", "evaluations_total", "alert", "alert_epsilon", "ledger_usable")
    assert [found[name] for name in counted] == [2, 2, 0, 1, 0.001, 1]
    assert found["seconds_total"] > 0 and found["last_contact_timestamp_seconds"] > 1.7e9
    assert {of for name, of in samples_of(path.read_text()) if "epsilon" in name} == {(("dataset", "default"),)}


def test_refusals_are_counted_by_what_they_are_about(tmp_path: Path, path: Path, real: MakeReal) -> None:
    settings, asks = small(tmp_path), {"metrics-path": str(path)}
    assert app(order(settings), real(settings, **asks, **{"max-steps-per-round": 1})).has_error()
    assert app(order(settings), real(settings, **asks, **{"max-steps-per-round": 1})).has_error()
    assert app(order(settings), real(settings, **asks, **{"max-epsilom": 1})).has_error()
    assert real_app(make_sum=FailsAt(1))(order(settings), real(settings, **asks)).has_error()
    found = values(path)
    assert (found["cap"], found["node-config"], found["failure"], found["messages_total"]) == (2, 1, 1, 4)
    assert found["rounds_total"] == 1 and found["epsilon_spent"] > 0  # what a failed round reserved stays counted


def test_a_node_config_that_cannot_be_used_is_counted_without_a_ledger(tmp_path: Path, path: Path, real: MakeReal) -> None:
    settings = small(tmp_path)
    assert app(order(settings), real(settings, **{"metrics-path": str(path), "max-epsilon": "much"})).has_error()
    assert values(path)["ledger_usable"] == 0 and values(path)["node-config"] == 1 and "epsilon_spent" not in values(path)


class Killed(BaseException):
    """Ends a process where it is, as kill -9."""


def test_what_a_killed_process_reserved_is_in_the_file_when_the_site_starts_again(tmp_path: Path, path: Path) -> None:
    ledger = new_ledger(tmp_path)
    node_config: dict[str, Any] = {
        **{"ledger-path": str(ledger), "max-epsilon": 50.0, "delta": DELTA, "num-records": 300, "allow-run-model": True},
        **{"task": "image", "labels": "a,b", "metrics-path": str(path)},
    }
    noted(node_config, "budget: x", 5.0)
    serve(ledger)
    session(ledger, server_round=2).reserve(1.0, 0.1, 3)  # and the process died
    before = values(path)
    refreshed(node_config)
    after = values(path)
    assert (before["rounds_total"], after["rounds_total"]) == (0, 2)
    assert after["epsilon_spent"] > before["epsilon_spent"] == 0
    assert (after["budget"], after["seconds_total"], after["messages_total"]) == (1, 5.0, 1)


def test_a_trainer_that_died_is_counted_by_the_process_that_waited(tmp_path: Path, path: Path, real: MakeReal) -> None:
    settings = small(tmp_path)
    held = real(settings, **{"metrics-path": str(path)})

    def answered(found: Told) -> Message:
        return answer(raising(AssertionError("served twice")), order(settings), held, lambda: 0.0, elsewhere=lambda *_: found)

    assert answered(Told(None, FAILURE)).has_error()
    assert values(path)["failure"] == 1
    assert answered(Told(None, "cap: x", every=0.0)).has_error()  # one that lives has counted it itself
    assert values(path)["messages_total"] == 1


def test_the_time_it_shows_is_that_at_which_the_reply_leaves(tmp_path: Path, path: Path, real: MakeReal) -> None:
    settings, now = small(tmp_path), [100.0]

    def work(content: RecordDict, context: Context) -> RecordDict:
        now[0] += 7.3
        return RecordDict()

    answer(work, order(settings), real(settings, **{"metrics-path": str(path)}), lambda: 5.0, lambda: now[0], lambda _: None)
    assert values(path)["seconds_total"] == 10.0


@pytest.mark.parametrize("where", ["gone/site.prom", "folder", "~nobody-here/site.prom"])
def test_a_file_that_cannot_be_written_costs_one_warning(where: str, tmp_path: Path, real: MakeReal) -> None:
    (tmp_path / "folder").mkdir()
    settings, own, logger = small(tmp_path), Heard(), logging.getLogger("lalora_flwr.site")
    logger.addHandler(own)
    try:
        for server_round in (1, 2):
            held = real(settings, **{"metrics-path": where if where.startswith("~") else str(tmp_path / where)})
            assert not app(order(settings, server_round), held).has_error()
    finally:
        logger.removeHandler(own)
    assert own.text.count("cannot be written") == 1 and "the site goes on" in own.text


def test_a_ledger_that_cannot_be_used_is_said(tmp_path: Path, path: Path, real: MakeReal) -> None:
    settings = small(tmp_path)
    held = real(settings, **{"metrics-path": str(path)})
    Path(str(held.node_config["ledger-path"])).write_bytes(b"not a ledger")
    assert app(order(settings), held).has_error()
    assert values(path)["ledger"] == 1 and values(path)["ledger_usable"] == 0


def test_a_virtual_site_and_one_without_the_key_write_nothing(tmp_path: Path, real: MakeReal) -> None:
    settings = small(tmp_path)
    assert not app(order(settings), real(settings)).has_error()
    assert not list(tmp_path.rglob("*.prom"))


def alerts(path: Path, **changed: Any) -> int:
    """Warnings of a round with an alert at 0.3."""
    own, logger = Heard(), logging.getLogger("lalora_flwr.site")
    logger.addHandler(own)
    try:
        ledger = SiteLedger(LedgerFile(path, 5.0), request(**changed), 1e6, DELTA, compose, alert_epsilon=0.3)
        ledger.identify(f"records of {changed.get('dataset', 'default')}")
        ledger.reserve(1.0, 0.1, 4)  # the square of ε grows by 0.04
        for _ in range(4):
            ledger.take_step()
        ledger.commit()
    finally:
        logger.removeHandler(own)
    return own.text.count("epsilon has reached alert-epsilon = 0.3")


def test_the_log_has_one_warning_when_epsilon_reaches_the_threshold(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    assert [alerts(path, server_round=number) for number in range(1, 6)] == [0, 0, 1, 0, 0]
    assert alerts(path, dataset="another") == 0


def test_the_metric_counts_what_is_refused_and_never_raises(path: Path) -> None:
    for error in (SiteRefusal("cap: x"), LedgerError("x")):
        noted({"metrics-path": str(path)}, str(error), 1.0, clock=lambda: 7.0)
    assert values(path) == {
        **{"ledger_usable": 0, "messages_total": 2, "cap": 1, "other": 1, "seconds_total": 2.0},
        "last_contact_timestamp_seconds": 7.0,
    }
