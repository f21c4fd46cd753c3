"""A simulation on Ray in a process that lives only for one run.

`flwr run` alone exits 0 when a run fails, installs an app's dependencies at run time and leaves results where the SuperLink was
first started, and takes four more processes to begin. Here the simulation is a child process, and a run counts as good only
if its summary was written.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from pathlib import Path

from lalora_flwr.engines.ray_process import CLIENT_APP, RayProcess
from lalora_flwr.ground.errors import RunFailed, WorkerDied
from lalora_flwr.ground.extras import need
from lalora_flwr.server.folder import LOG, WORKER_DIED
from lalora_flwr.server.metrics import FAILURE, METRICS, SUMMARY, OnRound, RoundMetrics
from lalora_flwr.server.place import folder_for, named
from lalora_flwr.settings import Settings
from lalora_flwr.settings.paths import with_absolute_paths

log = logging.getLogger("lalora_flwr.cli")
RESTARTS = 2  # times a run goes on by itself after a dead Ray worker
LOOK = 0.1  # seconds between two looks at what the server wrote
LAST_WORDS = 500  # characters of its output, if it ended without a reason


def run_simulation(
    settings: Settings,
    on_round: OnRound | None = None,
    *,
    num_actors: int = 0,
    client_app: str = CLIENT_APP,
    restarts: int = RESTARTS,
    ready: RayProcess | None = None,
) -> Path:
    """Run a federation of Ray-backed virtual sites and return its run folder.

    If a Ray worker dies, the run goes on after its last finished round in a fresh Ray, up to ``restarts`` times.

    Args:
        settings: the run; ``train.num-threads`` is also the number of CPUs that Ray reserves for a site.
        on_round: gets each line of metrics, soon after the server wrote it.
        num_actors: workers at most; 0: as many as the machine's CPUs carry.
        client_app: the ClientApp, ``module:attribute``.
        restarts: times that it goes on by itself after a dead worker.
        ready: a process that was started before, for these settings and this app; it is ended here. Default: a new one.

    Raises:
        ConfigError: Ray is not installed.
        RunFailed: if the run ended without a summary, with its reason; its log then lies in the run folder.
    """
    need("ray", "the Ray engine")
    settings = with_absolute_paths(named(settings))
    for attempt in range(restarts + 1):
        try:
            with ready or RayProcess(settings, num_actors, client_app) as process:
                return _attempt(settings, on_round, process)
        except WorkerDied as death:
            if attempt == restarts:
                raise
            log.warning("%s; starting Ray again", death)
            settings, ready = dataclasses.replace(settings, resume=True), None
    raise AssertionError("unreachable")


def _attempt(settings: Settings, on_round: OnRound | None, process: RayProcess) -> Path:
    """One process and one Ray, from the start or the last checkpoint to the summary."""
    folder = folder_for(settings)
    told = len(_lines_of(folder))  # of the attempt that is resumed
    (folder / FAILURE).unlink(missing_ok=True)
    process.begin(settings)
    try:
        _follow(process, folder, told, on_round)
    finally:
        process.close()
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOG).open("ab") as kept:  # after those of earlier attempts
            kept.write(process.said)
    return folder


def _lines_of(folder: Path) -> list[str]:
    """All that are written to their end."""
    return (folder / METRICS).read_text().split("\n")[:-1] if (folder / METRICS).exists() else []


def _follow(process: RayProcess, folder: Path, told: int, on_round: OnRound | None) -> None:
    """Pass on lines of metrics after the first ``told`` until there is a result, or there will be none."""
    over, size = False, -1
    while not over:
        over = process.ended or (folder / SUMMARY).exists() or (folder / FAILURE).exists()
        now = (folder / METRICS).stat().st_size if (folder / METRICS).exists() else 0
        lines = _lines_of(folder) if now != size else []
        size = now
        for line in lines[told:]:
            if on_round:
                on_round(RoundMetrics.from_json(json.loads(line)))
        told = max(told, len(lines))
        if not over:
            time.sleep(LOOK)
    if (folder / SUMMARY).exists():
        return
    if (folder / FAILURE).exists():
        failure = json.loads((folder / FAILURE).read_text())
        raise (WorkerDied if failure.get("kind") == WORKER_DIED else RunFailed)(failure["error"])
    process.close()
    words = process.said[-LAST_WORDS:].decode(errors="replace").strip()
    raise RunFailed(f"the simulation ended without a result: {words}")
