"""The body of the process in which Flower's simulation runs: get ready, wait for the word, run.

Everything starts at once: Ray, its workers, which import what a site needs before they have work, and the server's thread,
which imports what it needs and waits.
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
from typing import Any, NoReturn

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from lalora_flwr.ground.owner import end_with_owner
from lalora_flwr.privacy.accounting import CALIBRATIONS
from lalora_flwr.privacy.kept import cache_folder
from lalora_flwr.settings import Value, settings_from

Resources = dict[str, Any]  # num_supernodes; num_cpus and num_gpus of a site; num_actors at most, or 0
STOPPED = 143  # exit status after SIGTERM


class NamedApp(ClientApp):
    """A ClientApp that a worker imports by name, and whose sites are handed the run-config.

    Flower sends a ClientApp along with each message, and leaves the run-config empty where there is no app bundle.
    """

    def __init__(self, place: str) -> None:
        """``place``: ``module:attribute``."""
        super().__init__()
        self._place = place
        self.values: dict[str, Value] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        module, _, attribute = self._place.partition(":")
        app: ClientApp = getattr(importlib.import_module(module), attribute)
        own = Context(context.run_id, context.node_id, context.node_config, context.state, dict(self.values))
        reply = app(message, own)
        context.state = own.state
        return reply


def share_of_site(resources: Resources) -> Resources:
    """What Ray reserves for a site."""
    return {"num_cpus": resources["num_cpus"], **({"num_gpus": resources["num_gpus"]} if resources["num_gpus"] else {})}


def import_site() -> None:
    """What Ray calls in each new worker."""
    importlib.import_module("lalora_flwr.site.round")
    CALIBRATIONS.open(cache_folder())


def start_ray(resources: Resources) -> None:
    """Start Ray, or join the cluster that ``RAY_ADDRESS`` names. Flower joins what it finds."""
    import ray

    path = os.pathsep.join(sys.path)  # Ray's processes inherit variables, not this process's own path
    os.environ["PYTHONPATH"] = path
    at_most = {"num_cpus": resources["num_actors"] * resources["num_cpus"]} if resources["num_actors"] else {}
    ray.init(
        include_dashboard=False,
        logging_level=logging.WARNING,
        runtime_env={
            "env_vars": {"PYTHONPATH": path},
            "worker_process_setup_hook": f"lalora_flwr.engines.ray_main.{import_site.__name__}",
        },
        **at_most,
    )


def main(resources: str, client_app: str) -> None:
    """Get ready, and run what one line of the standard input says; without one, nothing.

    Args:
        resources: that the run will need, as JSON.
        client_app: of its sites, ``module:attribute``.
    """
    from flwr.simulation import run_simulation

    from lalora_flwr.ground.logs import json_logs

    end_with_owner()
    json_logs()
    needed: Resources = json.loads(resources)
    start_ray(needed)
    handlers: list[Callable[[], None]] = []

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for handler in handlers:
            handler()
        os._exit(STOPPED)  # the server's thread waits for replies that will not come

    signal.signal(signal.SIGTERM, stop)
    server_app, sites = ServerApp(), NamedApp(client_app)

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        from lalora_flwr.server.run import run_federation

        if order := sys.stdin.readline():
            CALIBRATIONS.open(cache_folder())
            sites.values = json.loads(order)
            log = logging.getLogger("lalora_flwr.server")
            log.handlers = logging.getLogger("flwr").handlers
            log.setLevel(logging.INFO)
            log.info("results are in %s", run_federation(settings_from(sites.values), grid, at_exit=handlers.append))

    backend = {"client_resources": share_of_site(needed), "init_args": {}}
    run_simulation(server_app, sites, needed["num_supernodes"], backend_config=backend)


if __name__ == "__main__":
    main(*sys.argv[1:])
