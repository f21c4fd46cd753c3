"""A real federation on loopback: one SuperLink with TLS and node authentication, SuperNodes, and Flower's own command.

Everything lies under one folder and runs as child processes of the test; whatever happens, all of them, and all that they
started, are dead when the ``with`` block ends. If the test's own process is killed, the kernel kills them.

    with Federation(tmp_path) as federation:
        federation.start_superlink()
        federation.add_sites({"north": records, "south": more}, {"max-epsilon": 4.0})
        run = federation.submit({"num-rounds": 2, "num-supernodes": 2, …})
        federation.process("north").kill()          # fault injection: SIGKILL
        federation.start_site("north")              # goes on trying until the SuperLink takes it back
        assert federation.wait(run) == "finished:completed"
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from lalora_flwr.cli.certs import superlink_files, supernode_keys
from lalora_flwr.ledger.file import create as create_ledger
from tests.deployment.processes import LOOPBACK, Running, free_port, lives, wait_for

ROOT = Path(__file__).parents[2]
MARK = "LALORA_TEST_FEDERATION"  # of all descendants, in their environment: some leave the process tree
CONNECTED = "SuperNode ID:"  # in a SuperNode's log, once the SuperLink has accepted it
CAPS: dict[str, Any] = {  # what each site allows, unless a test says otherwise
    **{"max-epsilon": 8.0, "delta": 1e-4, "num-records": 60, "answer-seconds": 0, "allow-run-model": True},
    **{"task": "text", "labels": "bad,good"},
}
SITE_START = ("lalora", "site", "start", "--")  # the safe way to start a site


class Federation:
    """See the module."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.certificates = folder / "certificates"
        self.port = free_port()
        self._mark = uuid.uuid4().hex
        self._running: dict[str, Running] = {}
        self._sites: dict[str, list[str]] = {}  # command of each

    def __enter__(self) -> Federation:
        superlink_files(self.certificates, [], days=1)
        self.connect("test", self.port)
        return self

    def __exit__(self, *_: object) -> None:
        family = [child for running in self._running.values() for child in running.descendants()]
        for running in self._running.values():
            if running.alive():
                running.kill()
        deadline = time.monotonic() + 10
        while (left := [*self._marked(), *filter(lives, family)]) and time.monotonic() < deadline:
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.1)
        assert not left, f"still alive: {left}"

    def _marked(self) -> list[psutil.Process]:
        """All living processes of this federation."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self._mark:
                    found.append(process)
        return found

    def environment(self, who: str) -> dict[str, str]:
        """Each member has a home of its own, as on machines of their own."""
        home = self.folder / who
        home.mkdir(exist_ok=True)
        return {
            **os.environ,
            "PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", ""),
            MARK: self._mark,
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "HF_HUB_OFFLINE": "1",
            "NO_COLOR": "1",
        }

    def start(self, name: str, *command: str) -> Running:
        """Any member's process, with its own home, working folder and log."""
        env = self.environment(name)
        self._running[name] = Running(name, list(command), env, self.folder / name, self.folder / f"{name}.log")
        return self._running[name]

    def process(self, name: str) -> Running:
        """The newest process of a member: ``superlink`` or a site."""
        return self._running[name]

    # the SuperLink

    def start_superlink(self, *more: str, certificates: Path | None = None) -> Running:
        """Start, or start again after a kill: the state lies in a database file. Returns when it answers."""
        place = certificates or self.certificates
        running = self.start(
            "superlink",
            *("flower-superlink", "--host", LOOPBACK, "--port", str(self.port)),
            *("--ssl-ca-certfile", str(place / "ca.crt")),
            *("--ssl-certfile", str(place / "superlink.crt"), "--ssl-keyfile", str(place / "superlink.key")),
            *("--enable-supernode-auth", "--database", str(self.folder / "state.db")),
            *more,
        )
        wait_for("the SuperLink's port", lambda: not running.alive() or self._listens())
        assert running.alive(), running.said()
        return running

    def _listens(self) -> bool:
        with socket.socket() as s:
            s.settimeout(1)
            return s.connect_ex((LOOPBACK, self.port)) == 0

    def healthy(self) -> bool:
        """Whether the SuperLink answers over TLS with a certificate of the federation's authority."""
        context = ssl.create_default_context(cafile=str(self.certificates / "ca.crt"))
        try:
            with urllib.request.urlopen(f"https://{LOOPBACK}:{self.port}/health", timeout=5, context=context) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    # sites

    def keys(self, name: str) -> Path:
        """A site's private key, made at the first call; the public one lies beside it."""
        key = self.folder / "keys" / name
        if not key.exists():
            supernode_keys(key.parent, [name])
        return key

    def register(self, name: str) -> None:
        self.flwr("supernode", "register", f"{self.keys(name)}.pub", "test")

    def supernode_command(self, name: str, *, ca: Path | None = None, key: Path | None = None) -> list[str]:
        """The command of a well-behaved site, without node-config."""
        return [
            *("flower-supernode", "--superlink", f"{LOOPBACK}:{self.port}"),
            *("--root-certificates", str(ca or self.certificates / "ca.crt")),
            *("--auth-supernode-private-key", str(key or self.keys(name))),
            *("--host", LOOPBACK, "--port", str(free_port())),
        ]

    def add_sites(
        self,
        data: Mapping[str, Path],
        node_config: Mapping[str, Any] | None = None,
        *,
        own: Mapping[str, Mapping[str, Any]] | None = None,
        start: Sequence[str] = ("flower-supernode",),
    ) -> None:
        """Register and start sites, each with its own records and ledger.

        ``node_config`` goes to all of them (None takes a key of `CAPS` away), and ``own`` holds what one of them has beside;
        ``start`` is the command that takes a SuperNode's arguments: `SITE_START` checks the site and holds to its approved code.
        """
        for name, data_path in data.items():
            self.register(name)
            ledger = self.ledger(name)
            if not ledger.exists():
                create_ledger(ledger)
            paths = {"data-path": str(data_path), "ledger-path": str(ledger)}
            keys = {**paths, **CAPS, **(node_config or {}), **(own or {}).get(name, {})}
            config = " ".join(f"{key}={json.dumps(value)}" for key, value in keys.items() if value is not None)
            self._sites[name] = [*start, *self.supernode_command(name)[1:], "--node-config", config]
        for name in data:  # side by side: each takes seconds
            self.start(name, *self._sites[name])
        for name in data:
            self._wait_connected(name)

    def ledger(self, name: str) -> Path:
        return self.folder / f"{name}.ledger"

    def start_site(self, name: str, patience: float = 150.0) -> Running:
        """Start a site, again and again until it is accepted, as a supervisor would.

        For about a minute after a kill the SuperLink takes the site for alive and refuses it.
        """
        deadline = time.monotonic() + patience
        while True:
            running = self.start(name, *self._sites[name])
            wait_for(f"{name} to connect", lambda r=running: not r.alive() or CONNECTED in r.said())
            if running.alive():
                return running
            assert time.monotonic() < deadline, running.said()
            time.sleep(2)

    def _wait_connected(self, name: str) -> None:
        running = self.process(name)
        wait_for(f"{name} to connect", lambda: not running.alive() or CONNECTED in running.said(), patience=120)
        assert running.alive(), running.said()

    def online(self) -> int:
        """How many sites the SuperLink takes for connected."""
        nodes = self.flwr("supernode", "list", "test")["nodes"]
        return sum(node["status"] == "online" for node in nodes)

    # the operator

    def connect(self, name: str, port: int, **options: Any) -> None:
        """Add a SuperLink connection to the operator's Flower configuration."""
        self.environment("operator")
        file = self.folder / "operator" / "config.toml"
        options = options or {"root-certificates": str(self.certificates / "ca.crt")}
        with file.open("a") as config:
            config.write(tomli_w.dumps({"superlink": {name: {"address": f"{LOOPBACK}:{port}", **options}}}) + "\n")

    def try_flwr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = self.environment("operator")
        return subprocess.run(["flwr", *arguments], env=env, capture_output=True, text=True, timeout=120, cwd=self.folder)

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """The JSON answer of a ``flwr`` command that succeeds."""
        done = self.try_flwr(*arguments, "--format", "json")
        assert done.returncode == 0, done.stdout + done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        assert answer.get("success", True), answer
        return answer

    def submit(self, config: Mapping[str, Any], app: Path = ROOT) -> str:
        """``flwr run`` with the run-config's keys, flat; returns the run's id."""
        file = self.folder / "run.toml"
        file.write_text(tomli_w.dumps(dict(config)))
        return str(self.flwr("run", str(app), "test", "-c", str(file))["run-id"])

    def status(self, run: str) -> str:
        return str(self.flwr("list", "test", "--run-id", run)["runs"][0]["status"])

    def wait(self, run: str, patience: float = 300.0) -> str:
        """The status with which a run ended."""
        deadline = time.monotonic() + patience
        while not (status := self.status(run)).startswith("finished"):
            assert time.monotonic() < deadline, f"{status}\n{self.logs(run)}"
            time.sleep(2)
        return status

    def logs(self, run: str) -> str:
        """All that was said, for the message of a failed test."""
        own = "".join(f"== {r.name}\n{r.said()[-3000:]}\n" for r in self._running.values())
        return own + "== run\n" + self.try_flwr("log", run, "test", "--show").stdout[-5000:]
