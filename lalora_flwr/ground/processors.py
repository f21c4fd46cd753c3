"""How many processors this process may use."""

from __future__ import annotations

import os

from lalora_flwr.ground.errors import ConfigError


def processors() -> int:
    """Those that the system lets this process run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(wanted: int, available: int | None = None) -> None:
    """Refuse more threads than processors: they only wait for each other, and Ray would wait for ever for such a worker.

    Raises:
        ConfigError: saying how many there are.
    """
    available = processors() if available is None else available
    if wanted > available:
        raise ConfigError(f"train.num-threads = {wanted}: this machine has {available} processors for it; use at most those")
