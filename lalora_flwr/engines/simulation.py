"""Flower's simulation runtime (Ray) behind a private SuperLink that lives only for one run.

`flwr run` alone exits 0 when a run fails, installs an app's dependencies at run time and leaves results where the
SuperLink was first started. Here the SuperLink is a child process with its own home and port, dependencies are never
installed, and a run counts as good only if its summary was written.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from lalora_flwr.ground.errors import RunFailed, WorkerDied
from lalora_flwr.ground.extras import need
from lalora_flwr.ground.owner import OWNER
from lalora_flwr.server.folder import LOG, WORKER_DIED
from lalora_flwr.server.metrics import FAILURE, METRICS, SUMMARY, OnRound, RoundMetrics
from lalora_flwr.server.place import folder_for, named
from lalora_flwr.settings import Settings, flatten
from lalora_flwr.settings.paths import with_absolute_paths

log = logging.getLogger("lalora_flwr.cli")
Environment = dict[str, str]
CLIENT_APP = "lalora_flwr.client_app:app"
PR_SET_PDEATHSIG = 1
RESTARTS = 2  # times a run goes on by itself after a dead Ray worker
ENDED_CHECK = 5.0  # seconds between questions to Flower whether the run has ended; each starts a process


def _environment(home: Path) -> Environment:
    scripts = str(Path(sys.executable).parent)  # flower-superlink starts its helpers by name
    return {
        **os.environ,
        "PATH": scripts + os.pathsep + os.environ.get("PATH", ""),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": os.environ.get("RAY_ADDRESS", "local"),  # a cluster only if the user names one
        "NO_COLOR": "1",
        OWNER: str(os.getpid()),
    }


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def _superlink(home: Path, log: Path, environment: Callable[[Path], Environment] = _environment) -> Iterator[Environment]:
    """A private SuperLink; yields the environment in which the ``flwr`` command talks to it."""
    port, env = _free_port(), environment(home)
    address = f'address = "127.0.0.1:{port}"\ninsecure = true\n'
    (home / "config.toml").write_text(f'[superlink]\ndefault = "private"\n\n[superlink.private]\n{address}')
    command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=env,
            cwd=home,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
    try:
        _wait_until_healthy(process, port, log)
        yield env
    finally:
        _end(process)


def _end_with_parent() -> None:
    """Ask the kernel to end this process with its parent: a run that was killed must not go on unseen."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=0.5)
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RunFailed(f"Flower's SuperLink did not start: {log.read_text()[-500:].strip()}") from None
            time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the SuperLink and all it started: the simulation runs in a session of its own, and Ray's daemons below it."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(family, timeout=10)
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(alive, timeout=10)
    process.wait()


def _write_app(folder: Path, settings: Settings, client_app: str) -> None:
    """An app bundle that names the installed package's apps; it holds no code, no dependency and no binary."""
    flwr_app = {
        "publisher": "lalora",
        "components": {"serverapp": "lalora_flwr.server_app:app", "clientapp": client_app},
        "config": dict(flatten(settings)),
    }
    project = {
        "name": "lalora-run",
        "version": "1.0.0",
        "description": "One run of lalora-flwr.",
        "license": "Apache-2.0",
        "dependencies": [],
    }
    folder.mkdir()
    (folder / "pyproject.toml").write_text(tomli_w.dumps({"project": project, "tool": {"flwr": {"app": flwr_app}}}))


def _flwr(env: Environment, *arguments: str) -> dict[str, Any]:
    """The JSON answer of a ``flwr`` command."""
    done = subprocess.run(["flwr", *arguments, "--format", "json"], env=env, capture_output=True, text=True)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        raise RunFailed(f"flwr {arguments[0]}: {(done.stdout + done.stderr).strip()[-500:]}") from None
    if done.returncode or not answer.get("success", True):
        raise RunFailed(f"flwr {arguments[0]}: {answer.get('error-message', done.stderr.strip()[-500:])}")
    return answer


def _append_run_log(env: Environment, run_id: str, log: Path) -> None:
    """What the server and the simulated sites logged, which Flower keeps apart from the SuperLink's own log."""
    shown = subprocess.run(["flwr", "log", run_id, "--show"], env=env, capture_output=True, text=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n== log of the run ==\n{shown.stdout}{shown.stderr}")


@dataclass(frozen=True)
class Flower:
    """Flower's commands, as far as a run needs them.

    Attributes:
        superlink: folder for its home and file for its output -> a context with the environment in which `command` reaches it.
        command: environment and arguments of ``flwr`` -> its JSON answer.
        append_log: adds what server and sites logged to a file: environment, the run's id, the file.
        check_seconds: between questions whether the run has ended.
    """

    superlink: Callable[[Path, Path], AbstractContextManager[Environment]] = _superlink
    command: Callable[..., dict[str, Any]] = _flwr
    append_log: Callable[[Environment, str, Path], None] = _append_run_log
    check_seconds: float = ENDED_CHECK


def run_simulation(
    settings: Settings,
    on_round: OnRound | None = None,
    *,
    num_actors: int = 0,
    client_app: str = CLIENT_APP,
    restarts: int = RESTARTS,
    flower: Flower | None = None,
) -> Path:
    """Run a federation of Ray-backed virtual sites and return its run folder.

    If a Ray worker dies, the run goes on after its last finished round in a fresh Ray, up to ``restarts`` times.

    Args:
        settings: the run; ``train.num-threads`` is also the number of CPUs that Ray reserves for a site.
        on_round: gets each line of metrics, soon after the server wrote it.
        num_actors: workers at most; 0: as many as the machine's CPUs carry.
        client_app: the ClientApp, ``module:attribute``.
        restarts: times that it goes on by itself after a dead worker.
        flower: its commands; default: the installed ones.

    Raises:
        ConfigError: Ray is not installed.
        RunFailed: if the run ended without a summary, with its reason; Flower's log then lies in the run folder.
    """
    need("ray", "the Ray engine")
    settings = with_absolute_paths(named(settings))  # the server runs in another folder
    for attempt in range(restarts + 1):
        try:
            return _attempt(settings, on_round, num_actors, client_app, flower or Flower())
        except WorkerDied as death:
            if attempt == restarts:
                raise
            log.warning("%s; starting Ray again", death)
            settings = dataclasses.replace(settings, resume=True)
    raise AssertionError("unreachable")


def _attempt(settings: Settings, on_round: OnRound | None, num_actors: int, client_app: str, flower: Flower) -> Path:
    """One SuperLink and one Ray, from the start or the last checkpoint to the summary."""
    folder = folder_for(settings)
    told = _lines_of(folder)  # of the attempt that is resumed
    (folder / FAILURE).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="lalora-") as scratch:
        home, output = Path(scratch), Path(scratch) / LOG
        _write_app(home / "app", settings, client_app)
        try:
            with flower.superlink(home, output) as env:
                federation = f"num-supernodes={settings.num_supernodes} client-resources-num-cpus={settings.train.num_threads}"
                if settings.train.num_gpus:
                    federation += f" client-resources-num-gpus={settings.train.num_gpus}"
                if num_actors:
                    federation += f" init-args-num-cpus={num_actors * settings.train.num_threads}"
                started = flower.command(env, "run", str(home / "app"), "--federation-config", federation)
                try:
                    _follow(flower, env, str(started["run-id"]), folder, len(told), on_round)
                finally:
                    flower.append_log(env, str(started["run-id"]), output)
        finally:
            if output.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                with (folder / LOG).open("ab") as kept:  # after those of earlier attempts
                    kept.write(output.read_bytes())
        return folder


def _lines_of(folder: Path) -> list[str]:
    return (folder / METRICS).read_text().splitlines() if (folder / METRICS).exists() else []


def _follow(flower: Flower, env: Environment, run_id: str, folder: Path, told: int, on_round: OnRound | None) -> None:
    """Pass on lines of metrics after the first ``told`` until Flower says that the run has ended."""
    asked, status = time.monotonic(), ""
    while not status.startswith("finished"):
        written = (folder / SUMMARY).exists() or (folder / FAILURE).exists()
        if written or time.monotonic() - asked > flower.check_seconds:
            row = flower.command(env, "list", "--run-id", run_id)["runs"][0]
            asked, status, details = time.monotonic(), str(row["status"]), str(row.get("status-details", ""))
        lines = _lines_of(folder)
        for line in lines[told:]:
            if on_round:
                on_round(RoundMetrics.from_json(json.loads(line)))
        told = max(told, len(lines))
        time.sleep(0.2)
    if (folder / SUMMARY).exists():
        return
    if (folder / FAILURE).exists():
        failure = json.loads((folder / FAILURE).read_text())
        raise (WorkerDied if failure.get("kind") == WORKER_DIED else RunFailed)(failure["error"])
    raise RunFailed(f"Flower ended the run without a result: {status} {details}")
