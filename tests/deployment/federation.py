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

import ctypes
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from lalora_flwr.cli.certs import superlink_files, supernode_keys
from lalora_flwr.ledger.file import create as create_ledger

ROOT = Path(__file__).parents[2]
LOOPBACK = "127.0.0.1"
MARK = "LALORA_TEST_FEDERATION"  # of all descendants, in their environment: some leave the process tree
CONNECTED = "SuperNode ID:"  # in a SuperNode's log, once the SuperLink has accepted it
CAPS: dict[str, Any] = {  # what each site allows, unless a test says otherwise
    **{"max-epsilon": 8.0, "delta": 1e-4, "num-records": 60, "answer-seconds": 0, "allow-run-model": True},
    **{"task": "text", "labels": "bad,good"},
}
SITE_START = ("lalora", "site", "start", "--")  # the safe way to start a site
_libc = ctypes.CDLL(None)


def free_port() -> int:
    with socket.socket() as s:
        s.bind((LOOPBACK, 0))
        return int(s.getsockname()[1])


def _die_with_the_test() -> None:
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_for(what: str, found: Callable[[], Any], patience: float = 60.0, every: float = 0.1) -> Any:
    """The first true value of ``found``; a failed assertion if there is none in ``patience`` seconds."""
    deadline = time.monotonic() + patience
    while not (value := found()):
        assert time.monotonic() < deadline, f"waited {patience:g} s for {what}"
        time.sleep(every)
    return value


class Running:
    """A process with its log; each start appends to the same file."""

    def __init__(self, name: str, command: list[str], env: Mapping[str, str], folder: Path, log: Path) -> None:
        self.name, self.log = name, log
        self._begin = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                command,
                env=dict(env),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_the_test,
            )

    def said(self) -> str:
        """What it logged since this start."""
        return self.log.read_bytes()[self._begin :].decode(errors="replace")

    def alive(self) -> bool:
        return self.popen.poll() is None

    def exit_code(self, patience: float = 60.0) -> int:
        """Wait for its own end."""
        wait_for(f"the end of {self.name}; it said: {self.said()[-2000:]}", lambda: not self.alive(), patience)
        return int(self.popen.returncode)

    def kill(self) -> None:
        """SIGKILL to this process alone. What it started ends by itself: at once after `SITE_START`, else within 20 seconds."""
        self.popen.kill()
        self.popen.wait()

    def terminate(self) -> None:
        """SIGTERM, which Flower takes as a request to stop in order."""
        self.popen.terminate()
        self.popen.wait(timeout=60)

    def descendants(self, command: str = "") -> list[psutil.Process]:
        """Processes below this one whose command line holds ``command``: flwr-serverapp, flwr-clientapp, …"""
        found = []
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.popen.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if command in " ".join(child.cmdline()):
                        found.append(child)
        return found


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
        while (left := [*self._marked(), *filter(_lives, family)]) and time.monotonic() < deadline:
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

        ``node_config`` goes to all of them, and ``own`` holds what one of them has beside; ``start`` is the command that
        takes a SuperNode's arguments: `SITE_START` checks the site and holds to its approved code.
        """
        for name, data_path in data.items():
            self.register(name)
            ledger = self.ledger(name)
            if not ledger.exists():
                create_ledger(ledger)
            paths = {"data-path": str(data_path), "ledger-path": str(ledger)}
            keys = {**paths, **CAPS, **(node_config or {}), **(own or {}).get(name, {})}
            config = " ".join(f"{key}={json.dumps(value)}" for key, value in keys.items())
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


def save_texts(path: Path, count: int, seed: int) -> Path:
    """A CSV or Parquet file of labelled texts, in the words of `tests.models.folders`."""
    from datasets import Dataset

    chance = random.Random(seed)
    labels = [chance.choice(("bad", "good")) for _ in range(count)]
    table = Dataset.from_dict({"text": [f"the film is very {label}" for label in labels], "label": labels})
    _ = table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path)
    return path


def text_run(folder: Path, **overrides: Any) -> dict[str, Any]:
    """Run-config of two short rounds on two sites with a tiny text model, which is made under ``folder`` if it is missing."""
    from tests.models.folders import save_hf

    if not (folder / "model").exists():
        save_hf(folder / "model", "bert", "base")
        save_texts(folder / "public.csv", 30, seed=0)
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in overrides.items()}
    return {
        "num-rounds": 2,
        "num-supernodes": 2,
        "max-failures": 0,
        "output-dir": str(folder / "runs"),
        "run-name": "run",
        "model.name": f"hf/{folder / 'model'}",
        "data.name": "sites",
        "data.labels": "bad,good",
        "data.test": f"file:{folder / 'public.csv'}",
        "lora.rank": 2,
        "train.local-steps": 2,
        "train.batch-size": 10,
        "privacy.epsilon": 4.0,
        **named,
    }
