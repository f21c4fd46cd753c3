"""kill -9 of every process of a real deployment, at random moments, and ledgers that cannot be written.

Whatever dies, afterwards: no ledger counts less than its site released, every ledger verifies, no file is half written,
and the run is complete or says in one line why it stopped. Kills are drawn from a fixed seed; each waits for a stage of
the round (a message received, steps reserved, steps committed, …) and a random moment more, so that slow machines hit
the same stages.
"""

from __future__ import annotations

import re
import resource
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from tests.deployment.drill import STAGES, Drill
from tests.deployment.federation import Federation
from tests.deployment.processes import Running

pytestmark = pytest.mark.faults


def test_sites_die_before_during_and_after_rounds_and_one_comes_late(tmp_path: Path) -> None:
    """Site north is spared, so that each round has someone; south, which is late, and east die again and again.

    In a second run a site is gone for good: with ``max-failures`` the run goes on, without it ends in one line.
    """
    with Federation(tmp_path) as federation:
        drill = Drill(federation, tmp_path, seed=7)
        federation.start_superlink()
        drill.add_sites("north", "east")
        run = federation.submit(drill.run_config(num_rounds=4, num_supernodes=3, max_failures=2))
        drill.until("the server to wait for the late site", lambda: (tmp_path / "runs" / "run").exists())
        drill.add_sites("south")
        plan = [("order", False), ("process", False), ("process", True), ("committed", False), ("sent", False), ("before", False)]
        drill.draw.shuffle(plan)
        plan = [("reserved", False), ("reserved", True), *plan]  # stage, and whether only the ClientApp dies
        while not drill.ended():
            done = drill.rounds()

            def over(done: int = done) -> bool:
                return drill.rounds() > done or drill.ended()

            victims = [name for name in ("south", "east") if drill.connected(name)]
            drill.draw.shuffle(victims)
            for name in victims:
                if not plan or not drill.at(name, plan[0][0], over):
                    continue
                stage, only_app = plan.pop(0)
                if only_app:
                    drill.kill_app(federation.process(name), "flwr-clientapp", stage)
                else:
                    drill.kill_site(name, stage)
            drill.until("the next round", over)
        drill.report()
        assert federation.wait(run) == "finished:completed", federation.logs(run)
        summary = drill.check()
        assert summary["failures"] > 0
        assert len(drill.kills) >= 3  # as many as the sites are back in time for


def test_the_server_dies_in_the_middle_of_a_run_and_goes_on(tmp_path: Path) -> None:
    """flwr-serverapp and the SuperLink, each killed at random moments; each time the run is submitted again."""
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    with Federation(tmp_path) as federation:
        drill = Drill(federation, tmp_path, seed=11)
        superlink = federation.start_superlink()
        drill.add_sites("north", "south")
        config = drill.run_config(num_rounds=7, privacy__max_rounds=12)  # with room for the rounds that are lost
        federation.submit(config)
        drill.until("the first checkpoint", lambda: drill.rounds() or drill.ended())
        before = b""
        for target, stages in (
            ("flwr-serverapp", STAGES[1:]),
            ("flwr-serverapp", ("before",)),
            ("superlink", STAGES[1:]),
            ("flwr-serverapp", STAGES[1:]),
        ):
            stage = drill.draw.choice(stages)
            drill.until("flwr-serverapp", lambda s=superlink: s.descendants("flwr-serverapp"))
            assert drill.at("north", stage, drill.ended), superlink.said()
            if target == "superlink":
                superlink.kill()
                drill.kills.append(f"superlink, {stage}")
            else:
                drill.kill_app(superlink, target, stage)
            drill.until("the run's folder to be free", lambda: not _writes(metrics.parent))
            if target == "superlink":
                superlink = federation.start_superlink()
            assert metrics.read_bytes().startswith(before)
            before = metrics.read_bytes()
            if (drill.path / "summary.json").exists():  # it was done before it died
                break
            assert target != "superlink" or "the SuperLink ended" in (drill.path / "failure.json").read_text()
            federation.submit({**config, "resume": True})
            drill.until("the next attempt to begin", lambda: not (drill.path / "failure.json").exists())
        drill.until("the end", drill.ended)
        drill.report()
        assert metrics.read_bytes().startswith(before)
        summary = drill.check(lost=len(drill.kills))
        assert summary["failures"] == 0 and len(summary["sites"]) == 2 and summary["rounds"] == 7
        for node, counters in summary["sites"].items():
            epsilon, steps = drill._spent(drill._names[node], 0)
            assert counters["steps"] >= steps and counters["epsilon"] >= epsilon - 1e-9  # of all that was ever released
        assert len(drill.kills) >= 3


def test_ledgers_that_cannot_be_written_and_sites_that_are_gone_for_good(tmp_path: Path) -> None:
    """A locked ledger, then a full disk, then a site that never comes back: the run goes on with the other site. No site keeps a
    trainer, so that each message's own process meets the full disk.

    In a second run, which allows for no failure, the last site dies too: the run stops in one line.
    """
    refused = "ledger: the site cannot use it; its own log says why"
    with Federation(tmp_path) as federation:
        drill = Drill(federation, tmp_path, seed=3)
        federation.start_superlink()
        drill.add_sites("north", "south", **{"resident-seconds": 0})
        drill.learn_names()
        numbers = {name: node for node, name in drill._names.items()}
        held = drill.entries("north")
        with closing(sqlite3.connect(federation.ledger("north"), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            run = federation.submit(drill.run_config(num_rounds=3, max_failures=1))
            drill.until("a round with a locked ledger", lambda: drill.rounds() or drill.ended())
            assert drill.lines()[0]["failed_sites"] == {numbers["north"]: refused}, federation.logs(run)
            other.execute("ROLLBACK")
        assert drill.entries("north") == held

        before, size = drill.entries("south"), federation.ledger("south").stat().st_size
        working = drill.until("a ClientApp that imports", lambda: _importing(federation.process("south")))
        resource.prlimit(working.pid, resource.RLIMIT_FSIZE, (size, size))  # as on a full disk; the app is installed by now
        drill.until("a round with a full disk", lambda: drill.rounds() > 1 or drill.ended())
        assert drill.lines()[1]["failed_sites"] == {numbers["south"]: refused}, federation.logs(run)
        assert drill.entries("south") == before

        drill.gone = {"north", "south"}
        assert drill.at("north", "process", drill.ended)
        drill.kill_site("north", "process")
        drill.until("the end", drill.ended)
        assert federation.wait(run) == "finished:completed", federation.logs(run)
        assert [line["sites"] for line in drill.lines()] == [1, 1, 1]
        assert drill.check()["failures"] == 3

        drill.run = "alone"
        run = federation.submit(drill.run_config(run_name="alone", num_supernodes=1))
        assert drill.at("south", "process", drill.ended)
        drill.kill_site("south", "process")
        drill.until("the end", drill.ended)
        drill.report()
        assert "failed" in federation.wait(run), federation.logs(run)
        failure = drill.check()
        assert re.fullmatch(rf"round 1: 1 of 1 sites failed, no site is left \(site {numbers['south']}: .*\)", failure["error"])


def _importing(running: Running) -> psutil.Process | None:
    """The site's flwr-clientapp, once it has begun to import torch: seconds before it reserves."""
    for process in running.descendants("flwr-clientapp"):
        with suppress(psutil.Error):
            if any("libtorch" in part.path for part in process.memory_maps()):
                return process
    return None


def _writes(folder: Path) -> bool:
    """Whether a process still holds the run's folder."""
    import fcntl

    with (folder / ".lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
