"""The process in which a simulation runs on Ray, as the one that starts it sees it.

Most of a short run's time is start-up: torch and its friends in each process, and Ray's own. So the process is started as
soon as the settings hold, and makes itself ready while the plan is made and printed; it runs nothing before it is told what.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

from lalora_flwr.ground.owner import OWNER
from lalora_flwr.settings import Settings, flatten

MAIN = "lalora_flwr.engines.ray_main"
CLIENT_APP = "lalora_flwr.client_app:app"
PR_SET_PDEATHSIG = 1
Environment = dict[str, str]


def environment(home: Path) -> Environment:
    """What the process and all it starts find in their environment; ``home`` takes what Flower writes besides."""
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # as Flower's own simulation process has it
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's coming default, of which it warns
        "RAY_enable_worker_prestart": "0",  # workers without this run's surroundings, which no actor would take
        "RAY_prestart_worker_first_driver": "0",
        "RAY_max_direct_call_object_size": str(2**24),  # a parcel of updates comes with the answer, not by way of the store
        "RAY_task_events_report_interval_ms": "0",  # nobody looks at Ray's records of tasks and its metrics
        "RAY_enable_metrics_collection": "0",
        "RAY_ADDRESS": os.environ.get("RAY_ADDRESS", "local"),  # a cluster only if the user names one
        "NO_COLOR": "1",
        OWNER: str(os.getpid()),
    }


class RayProcess:
    """A simulation's process, from its start to the end of all that it started. A context, which ends it.

    Attributes:
        said: all that it and its workers said; complete once it is closed.
    """

    def __init__(self, settings: Settings, num_actors: int = 0, client_app: str = CLIENT_APP, module: str = MAIN) -> None:
        """Start it; it gets ready in the background.

        Args:
            settings: the run, as far as it tells sites and resources.
            num_actors: workers at most; 0: as many as the machine's CPUs carry.
            client_app: the ClientApp of its sites, ``module:attribute``.
            module: that it runs.
        """
        self._home = tempfile.TemporaryDirectory(prefix="lalora-")
        self.said = b""
        self._output = Path(self._home.name) / "output.log"
        resources = {
            "num_supernodes": settings.num_supernodes,
            "num_cpus": settings.train.num_threads,
            "num_gpus": settings.train.num_gpus,
            "num_actors": num_actors,
        }
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, json.dumps(resources), client_app],
                env=environment(Path(self._home.name)),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )

    def __enter__(self) -> RayProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, settings: Settings) -> None:
        """Let it run the federation."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, as `ended` says
            self._process.stdin.write(json.dumps(dict(flatten(settings))).encode() + b"\n")
            self._process.stdin.close()

    @property
    def ended(self) -> bool:
        """Whether it is over, well or not."""
        return self._process.poll() is not None

    def close(self) -> None:
        """End it and all it started: it runs in a session of its own, and Ray's daemons below it."""
        if not self._output.exists():  # closed before
            return
        end_family(self._process)
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        self.said = self._output.read_bytes()
        self._home.cleanup()


def end_family(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, by force after ten seconds."""
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


def _end_with_parent() -> None:
    """Ask the kernel to end this process with its parent: a run that was killed must not go on unseen."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
