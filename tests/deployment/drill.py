"""A run whose processes are killed at random moments, and what has to hold afterwards."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from typer.testing import CliRunner

from lalora_flwr.cli.main import app
from lalora_flwr.ledger.entries import Commit, Reserve
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.privacy.accounting import epsilon_spent
from tests.conftest import strict_json
from tests.deployment.federation import Federation
from tests.deployment.processes import Running, wait_for
from tests.deployment.texts import save_texts, text_run

STEPS = 20  # local steps: some tenths of a second between reserve and commit
LOOKS = 100  # for a process, a tenth of a second apart
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

    def add_sites(self, *names: str, count: int = 60, **node_config: Any) -> None:
        at = len(self.sites)
        data = {name: save_texts(self.folder / f"{name}.csv", count, seed=at + n) for n, name in enumerate(names)}
        self.federation.add_sites(data, {"device": "cpu", **node_config})

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
        """The newest such process; one that has done its work may still be on its way out.

        A look at all processes misses some while others come and go, so that there are a few looks before none is there.
        """
        for _ in range(LOOKS):
            with suppress(psutil.NoSuchProcess, ValueError):
                max(running.descendants(command), key=lambda process: process.create_time()).kill()
                self.kills.append(f"{running.name}: {command}, {stage}")
                return
            time.sleep(0.1)

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
