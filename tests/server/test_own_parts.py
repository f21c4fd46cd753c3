"""Whole runs in which something stays at real sites: the simulation's bits, lost replies, and a server that died."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, MetricRecord

from lalora_flwr.privacy.randomness import SeededRandom
from lalora_flwr.settings import Settings
from lalora_flwr.wire.orders import CONFIG, MEMORY
from lalora_flwr.wire.replies import COUNTERS, IDENTITY
from tests.conftest import AppCall, Finished, Spy, run_spied, small
from tests.ledger.site_ledgers import owned
from tests.server.test_resume import killed_after
from tests.site.failures import Heard
from tests.site.test_own_part import FEDSA, heard, kept, same
from tests.sites import real_app, servers_learner

__all__ = ["heard"]


class Unseeded(SeededRandom):
    """The draws of a virtual site, at a site that passes for a real one."""

    seeded = False


class RealSites:
    """Sites with ledgers and files of their own, whose noise is that of the virtual ones; of a round one reply may be spoilt."""

    def __init__(self, settings: Settings, folder: Path, spoilt: Mapping[int, int] | None = None) -> None:
        self._settings, self._folder, self._spoilt = settings, folder, dict(spoilt or {})
        self.contexts: dict[int, Context] = {}
        self.orders: list[Message] = []

    def __call__(self, message: Message, context: Context, app: AppCall) -> Message:
        site = int(context.node_config["partition-id"])
        if message.metadata.message_type == "query.identity":
            reply = app(message, context)
            reply.content[IDENTITY] = MetricRecord({"site": -1, "sites": -1})
            return reply
        (self._folder / str(site)).mkdir(parents=True, exist_ok=True)
        records = len(range(site, 1100, 3))  # an equal share
        more = {"num-records": records, "records-at-once": 10**6, "allow-evaluation": True, "evaluation-noise": 1.0}
        self.contexts[site] = owned(context, self._folder / str(site), run_id=context.run_id, **more)
        values: Any = message.content[CONFIG]
        drawn = Unseeded(self._settings.seed, site, values["server-round"])
        self.orders.append(message)
        reply = real_app(entropy=lambda: drawn)(message, context)
        if self._spoilt.get(values["server-round"]) == site and not reply.has_error():
            counters: Any = reply.content[COUNTERS]
            counters["steps"] = 0
        return reply


@pytest.mark.parametrize("who", [{}, {"train__local_steps": 1, "train__step_at": "server"}], ids=["site", "server"])
def test_real_sites_give_the_simulations_bits(who: dict[str, Any], tmp_path: Path, finished: Any) -> None:
    """``who``: takes the step on A."""
    done: Finished = finished(**FEDSA, **who)
    settings = small(tmp_path, **FEDSA, **who)
    sites = RealSites(settings, tmp_path / "sites")
    run = Finished(run_spied(settings, spy := Spy(sites)), settings, spy)
    assert run.summary["seeded"] is False and run.summary["failures"] == 0
    assert not [name for name in run.summary if name.startswith("personal")]
    for message in sites.orders:
        assert MEMORY not in message.content
    layout = servers_learner(settings).adapter.layout
    assert same({n: run.checkpoint[n] for n in layout}, {n: done.checkpoint[n] for n in layout})
    for site, (_, reply) in enumerate(done.spy.training(4)):
        assert same(kept(sites.contexts[site])[4], reply.content[MEMORY].to_torch_state_dict())  # type: ignore[union-attr]


def test_a_rejected_reply_and_a_run_that_died_leave_no_site_with_another_rounds_part(tmp_path: Path, heard: Heard) -> None:
    """Site 1's reply of round 2 is not merged; the server dies after round 3, and the run goes on under another id."""
    settings = small(tmp_path, **FEDSA, max_failures=1)
    sites = RealSites(settings, tmp_path / "sites", {2: 1})
    own: dict[int, dict[int, str]] = {}

    def noted(message: Message, context: Context, app: AppCall) -> Message:
        reply = sites(message, context, app)
        if message.metadata.message_type == "train":
            values: Any = message.content[CONFIG]
            own.setdefault(values["server-round"], {})[int(context.node_config["partition-id"])] = values["own"]
        return reply

    app: Any = Spy(noted)
    killed_after(settings, 3, app=app)
    run_spied(small(tmp_path, **FEDSA, max_failures=1, resume=True), Spy(noted))
    assert own[1] == {0: "", 1: "", 2: ""}
    assert own[3][1] == own[2][1] and own[3][0] != own[2][0]  # site 1 is told to go on from its round 1
    assert "goes back to what stayed at the site after round 1; what came of round 2 is given up" in heard.text
    assert "starts anew" not in heard.text and all(len(set(names.values())) == 3 for r, names in own.items() if r > 1)
