"""kill -9 of every process of a real deployment, at random moments, and ledgers that cannot be written.

Whatever dies, afterwards: no ledger counts less than its site released, every ledger verifies, no file is half written,
and the run is complete or says in one line why it stopped. Kills are drawn from a fixed seed; each waits for a stage of
the round (a message received, steps reserved, steps committed, …) and a random moment more, so that slow machines hit
the same stages.
"""

from __future__ import annotations

import random
import re
import resource
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from lalora_flwr.cli.main import app
from lalora_flwr.ledger.entries import Commit, Reserve
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.privacy.accounting import epsilon_spent
from tests.conftest import strict_json
from tests.deployment.federation import Federation, Running, save_texts, text_run, wait_for

pytestmark = pytest.mark.faults

STEPS = 20  # local steps: some tenths of a second between reserve and commit
PATIENCE = 400.0  # seconds; a dead site or ClientApp is noticed after about a minute
STAGES = ("before", "order", "process", "reserved", "committed", "sent")  # where a site can die in a round


class Drill:
    """A run under attack: restarts dead sites as a supervisor would, draws moments, counts kills."""

    def __init__(self, federation: Federation, folder: Path, seed: int) -> None:
        self.federation, self.folder, self.draw = federation, folder, random.Random(seed)
        self.run = "run"
        self.kills: list[str] = []
        self.gone: set[str] = set()  # sites that nobody starts again
        self._names: dict[str, str] = {}  # node id -> site
        self._tried: dict[str, float] = {}

    def add_sites(self, *names: str, count: int = 60) -> None:
        at = len(self.sites)
        data = {name: save_texts(self.folder / f"{name}.csv", count, seed=at + n) for n, name in enumerate(names)}
        self.federation.add_sites(data, {"device": "cpu"})

    @property
    def sites(self) -> list[str]:
        return list(self.federation._sites)

    def run_config(self, **overrides: Any) -> dict[str, Any]:
        return text_run(self.folder, train__local_steps=STEPS, **overrides)

    # waiting

    def supervise(self) -> None:
        """Start each dead site again, every few seconds until the SuperLink takes it back."""
        for name in self.sites:
            running = self.federation.process(name)
            if running.alive() or name in self.gone or time.monotonic() < self._tried.get(name, 0) + 5:
                continue
            self._tried[name] = time.monotonic()
            self.federation.start(name, *self.federation._sites[name])

    def until(self, what: str, found: Callable[[], Any], patience: float = PATIENCE) -> Any:
        def supervised() -> Any:
            self.supervise()
            return found()

        return wait_for(what, supervised, patience, every=0.02)

    def connected(self, name: str) -> bool:
        running = self.federation.process(name)
        return running.alive() and "SuperNode ID:" in running.said()

    @property
    def path(self) -> Path:
        return self.folder / "runs" / self.run

    def lines(self) -> list[dict[str, Any]]:
        """Metrics so far, a line a round."""
        metrics = self.path / "metrics.jsonl"
        return [strict_json(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []

    def rounds(self) -> int:
        return len(self.lines())

    def ended(self) -> bool:
        return (self.path / "summary.json").exists() or (self.path / "failure.json").exists()

    # killing

    def entries(self, name: str) -> list[Any]:
        return LedgerFile(self.federation.ledger(name)).read().entries

    def at(self, name: str, stage: str, ended: Callable[[], bool]) -> bool:
        """Wait for a stage of the site's round and a random moment more; false if the round ended first."""
        running, held = self.federation.process(name), len(self.entries(name))
        said = running.said().count

        def reached() -> bool:
            if stage == "before":
                return True
            if stage == "order":
                return said_now("Receiving: train") > orders
            if stage == "process":
                return said_now("Receiving: train") > orders and bool(set(running.descendants("flwr-clientapp")) - older)
            if stage == "sent":
                return said_now("Sent successfully") > sent
            return any(isinstance(entry, Reserve if stage == "reserved" else Commit) for entry in self.entries(name)[held:])

        def said_now(text: str) -> int:
            return running.said().count(text)

        older = set(running.descendants("flwr-clientapp"))
        orders, sent = said("Receiving: train"), said("Sent successfully")
        self.until(f"{name}: {stage}", lambda: ended() or not running.alive() or reached())
        time.sleep(self.draw.uniform(0, {"before": 2.0, "process": 3.0, "reserved": 0.02}.get(stage, 0.2)))
        return not ended() and running.alive()

    def kill_site(self, name: str, stage: str) -> None:
        self.federation.process(name).kill()
        self.kills.append(f"{name}: SuperNode, {stage}")

    def kill_app(self, running: Running, command: str, stage: str) -> None:
        """The newest such process; one that has done its work may still be on its way out."""
        with suppress(psutil.NoSuchProcess, ValueError):
            max(running.descendants(command), key=lambda process: process.create_time()).kill()
            self.kills.append(f"{running.name}: {command}, {stage}")

    # what must hold afterwards

    def learn_names(self) -> None:
        for name in self.sites:
            for node in re.findall(r"SuperNode ID:\s*(\d+)", (self.folder / f"{name}.log").read_text(errors="replace")):
                self._names[node] = name

    def check(self, lost: int = 0) -> dict[str, Any]:
        """Ledgers, files, and the run's end; returns the summary, or the failure. ``lost``: rounds in which the server died."""
        self.learn_names()
        folder, lines = self.path, self.lines()
        left = [path.name for path in folder.rglob("*") if path.name.endswith(".part")]
        assert [line["round"] for line in lines] == list(range(1, len(lines) + 1))
        spent = {name: self._spent(name, (lost + self._failed(lines, name)) * STEPS) for name in self.sites}
        assert all(line["epsilon"] <= max(epsilon for epsilon, _ in spent.values()) + 1e-9 for line in lines)
        if (folder / "failure.json").exists():
            assert not (folder / "summary.json").exists()
            failure: dict[str, Any] = strict_json((folder / "failure.json").read_text())
            assert failure["error"] and "\n" not in failure["error"] and not failure["error"].startswith("unexpected"), failure
            return failure
        assert not left
        summary: dict[str, Any] = strict_json((folder / "summary.json").read_text())
        assert len(lines) == summary["rounds"]
        for node, counters in summary["sites"].items():
            epsilon, steps = spent[self._names[node]]
            assert counters["epsilon"] <= epsilon + 1e-9 and counters["steps"] <= steps
        return summary

    def _failed(self, lines: list[dict[str, Any]], name: str) -> int:
        """Rounds that a site failed. The server counts them in full, and tells the site, which counts them in its replies."""
        return sum(self._names[node] == name for line in lines for node in line["failed_sites"])

    def _spent(self, name: str, more: int) -> tuple[float, int]:
        """ε composed from the ledger's entries and so many steps more, and their number. What nobody committed counts in full."""
        verified = CliRunner().invoke(app, ["ledger", "verify", str(self.federation.ledger(name))])
        assert verified.exit_code == 0, verified.output
        (sigma, q, steps), *others = LedgerFile(self.federation.ledger(name)).read().book.segments("default")
        segments = [(sigma, q, steps + more), *others]
        return epsilon_spent(segments, 1e-4), sum(steps for _, _, steps in segments)

    def cut(self) -> int:
        """Reservations whose process died before it could commit."""
        every = [entry for name in self.sites for entry in self.entries(name)]
        return sum(isinstance(entry, Reserve) for entry in every) - sum(isinstance(entry, Commit) for entry in every)

    def report(self) -> None:
        print(f"{len(self.kills)} kills, {self.cut()} inside of a reservation: {'; '.join(self.kills)}")


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
    """A locked ledger, then a full disk, then a site that never comes back: the run goes on with the other site.

    In a second run, which allows for no failure, the last site dies too: the run stops in one line.
    """
    refused = "ledger: the site cannot use it; its own log says why"
    with Federation(tmp_path) as federation:
        drill = Drill(federation, tmp_path, seed=3)
        federation.start_superlink()
        drill.add_sites("north", "south")
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
