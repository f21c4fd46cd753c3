"""The body of the process in which a run on Ray has its server: get ready, wait for the word, run.

Everything starts at once: Ray, its workers, which import what a site needs before they have work, and the server, which
imports what it needs and waits.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from lalora_flwr.ground.logs import json_logs
from lalora_flwr.ground.owner import end_with_owner
from lalora_flwr.privacy.accounting import CALIBRATIONS
from lalora_flwr.privacy.kept import cache_folder
from lalora_flwr.settings import settings_from

MODULE = "lalora_flwr.engines.ray_main"  # whose name in the process that it is the body of is another
STOPPED = 143  # exit status after SIGTERM


def import_site() -> None:
    """What Ray calls in each new worker."""
    importlib.import_module("lalora_flwr.site.round")
    CALIBRATIONS.open(cache_folder())


def main(resources: str, client_app: str) -> None:
    """Get ready, and run what one line of the standard input says; without one, nothing.

    Args:
        resources: that the run will need, as JSON.
        client_app: of its sites, ``module:attribute``.
    """
    from lalora_flwr.engines.ray_workers import RayWorkers, start_ray

    end_with_owner()
    json_logs()
    handlers: list[Callable[[], None]] = []

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for handler in handlers:
            handler()
        os._exit(STOPPED)  # Ray would first wait for what its workers do

    start_ray(json.loads(resources), f"{MODULE}.{import_site.__name__}")
    signal.signal(signal.SIGTERM, stop)
    workers = RayWorkers(json.loads(resources), client_app)

    from lalora_flwr.engines.ray_grid import RayGrid
    from lalora_flwr.engines.site_worker import app_at
    from lalora_flwr.server.run import run_federation

    if order := sys.stdin.readline():
        CALIBRATIONS.open(cache_folder())
        settings, values = settings_from(json.loads(order)), json.loads(order)
        workers.begin(settings.num_supernodes, values)
        grid = RayGrid(app_at(client_app), settings.num_supernodes, values, workers)
        log = logging.getLogger("lalora_flwr.server")
        log.handlers = logging.getLogger("flwr").handlers
        log.setLevel(logging.INFO)
        log.info("results are in %s", run_federation(settings, grid, at_exit=handlers.append))


if __name__ == "__main__":
    main(*sys.argv[1:])
