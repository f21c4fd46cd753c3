"""A process ends with another, however that one ends: a simulation with the process that started it, a site's resident trainer
with the SuperNode's.

Flower's simulation outlives a killed SuperLink: it would go on training, and writing to the run's folder, unseen. So the
process that starts it leaves its number in the environment, and the simulation looks whether that process is alive.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil

OWNER = "LALORA_OWNER_PID"
LOOK = 0.5  # seconds between two looks at the owner
GRACE = 10.0  # seconds from the request to end to the kill


def end_with_owner() -> None:
    """End this process soon after the one named in the environment, if one is named."""
    if named := os.environ.get(OWNER):
        end_with(int(named))


def end_with(process: int) -> None:
    """End this process soon after another one."""
    threading.Thread(target=_watch, args=(process,), name="owner", daemon=True).start()


def _watch(pid: int) -> None:
    try:
        owner = psutil.Process(pid)
        while owner.is_running():  # the same process, not another with its number
            time.sleep(LOOK)
    except psutil.NoSuchProcess:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)
