"""When a real site's replies leave: at multiples of its owner's answer-seconds, whatever they took."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from lalora_flwr.ground.errors import LedgerError, SiteRefusal
from lalora_flwr.site.app import answer, leaves_at, seconds_between
from tests.ledger.site_ledgers import DIGITS_SITE

TIMES = st.floats(0, 1e6)


@given(TIMES, st.floats(0, 1e4), st.floats(0.01, 3600))
def test_a_reply_leaves_at_the_next_multiple(arrived: float, took: float, every: float) -> None:
    now = arrived + took
    leaves = leaves_at(arrived, now, every)
    assert leaves >= now - 1e-6 and leaves - now <= every + 1e-6
    assert (leaves - arrived) / every == pytest.approx(round((leaves - arrived) / every), abs=1e-4)
    assert leaves - arrived >= every * (1 - 1e-6)


@given(TIMES, st.floats(0, 1e4))
def test_zero_seconds_do_not_wait(arrived: float, took: float) -> None:
    assert leaves_at(arrived, arrived + took, 0) == arrived + took


class Clock:
    """Work takes ``took`` seconds; waiting takes what it says."""

    def __init__(self) -> None:
        self.now, self.waited = 1000.0, 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.waited += seconds


@pytest.fixture(autouse=True)
def _stamps() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def answered(took: float, outcome: Exception | None, node_config: dict[str, Any], *, simulated: bool = False) -> float:
    """Seconds from the order to the reply."""
    clock = Clock()

    def work(content: RecordDict, context: Context) -> RecordDict:
        clock.now += took
        if outcome:
            raise outcome
        return RecordDict()

    message = Message(RecordDict(), dst_node_id=7, message_type="train")
    context = Context(run_id=1, node_id=7, node_config=node_config, state=RecordDict(), run_config={})
    reply = answer(work, message, context, lambda: seconds_between(simulated, node_config), clock, clock.wait)
    assert reply.has_error() == (outcome is not None)
    return clock.now - 1000.0


REAL = {**DIGITS_SITE, "ledger-path": "l"}
OUTCOMES = [None, SiteRefusal("cap: x"), LedgerError("x"), RuntimeError("x")]


@pytest.mark.parametrize("outcome", OUTCOMES, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize(("took", "leaves"), [(0.0, 5), (0.2, 5), (4.9, 5), (5.1, 10), (31.0, 35)])
def test_every_kind_of_answer_waits_alike(outcome: Exception | None, took: float, leaves: float) -> None:
    node_config = {key: value for key, value in REAL.items() if key != "answer-seconds"}
    assert answered(took, outcome, node_config) == pytest.approx(leaves)
    assert answered(took, outcome, {**REAL, "answer-seconds": 60}) == pytest.approx(60)
    assert answered(took, outcome, REAL) == pytest.approx(took)


def test_a_simulation_and_a_site_without_caps_never_wait() -> None:
    assert answered(0.2, SiteRefusal("node-config: x"), {}) == pytest.approx(0.2)
    assert answered(0.2, None, {**REAL, "answer-seconds": 60}, simulated=True) == pytest.approx(0.2)
