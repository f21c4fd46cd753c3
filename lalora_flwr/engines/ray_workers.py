"""The workers of the Ray engine, one actor each: given a parcel when they are idle, looked at when they are done."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from flwr.app import ArrayRecord

from lalora_flwr.engines.parcels import Answer, Sent
from lalora_flwr.engines.site_worker import SiteWorker
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.settings import Value
from lalora_flwr.wire.tensors import num_bytes

LARGE = 1_000_000  # bytes from which what parcels share is put into Ray's store, once; less travels with each of them
Resources = dict[str, Any]  # num_cpus and num_gpus of a worker; num_actors at most, or 0
Ticket = Any  # a parcel that a worker has: what Ray calls the result to come
Answered = tuple[list[Answer], int]  # as `SiteWorker.serve` has it


def start_ray(resources: Resources, hook: str) -> None:
    """Start Ray, or join the cluster that ``RAY_ADDRESS`` names.

    Args:
        resources: that the run will need.
        hook: a function that each new worker calls, by its full name.
    """
    import ray

    path = os.pathsep.join(sys.path)  # Ray's processes inherit variables, not this process's own path
    os.environ["PYTHONPATH"] = path
    at_most = {"num_cpus": resources["num_actors"] * resources["num_cpus"]} if resources["num_actors"] else {}
    ray.init(
        include_dashboard=False,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": {"PYTHONPATH": path}, "worker_process_setup_hook": hook},
        **at_most,
    )


def how_many(nodes: Sequence[dict[str, Any]], resources: Resources) -> int:
    """Workers that fit, each on one node.

    Args:
        nodes: as Ray describes them.
        resources: as `Resources`.
    """
    count = 0
    for node in nodes:
        there = node["Resources"] if node["Alive"] else {}
        fit = int(there.get("CPU", 0) / resources["num_cpus"])
        if resources["num_gpus"]:
            fit = min(fit, int(there.get("GPU", 0) / resources["num_gpus"]))
        count += fit
    return count


class RayWorkers:
    """As many workers as the machine or the cluster carries. A dead one is given nothing any more."""

    def __init__(self, resources: Resources, client_app: str) -> None:
        """Start them; Ray must be there.

        Args:
            resources: of each.
            client_app: the ClientApp of their sites, ``module:attribute``.

        Raises:
            ConfigError: not even one fits.
        """
        import ray  # a light install has none

        share = {"num_cpus": resources["num_cpus"], "num_gpus": resources["num_gpus"] or 0}
        count = how_many(ray.nodes(), resources)  # type: ignore[no-untyped-call]
        if not count:
            raise ConfigError(
                f"train.num-threads = {share['num_cpus']}, train.num-gpus = {share['num_gpus']:g}: no node of Ray's has as much"
            )
        make: Any = ray.remote(SiteWorker).options(**share)
        self._all: list[Any] = [make.remote(client_app) for _ in range(count)]
        self._ray: Any = ray
        self._idle, self._busy = list(self._all), dict[Ticket, Any]()

    def begin(self, sites: int, run_config: dict[str, Value]) -> None:
        """Tell all of them the run's settings and its number of sites."""
        for worker in self._all:
            worker.begin.remote(sites, run_config)

    @property
    def alive(self) -> int:
        return len(self._all)

    @property
    def idle(self) -> int:
        return len(self._idle)

    def shared(self, common: Sequence[ArrayRecord]) -> object:
        """What parcels hold in common, as `give` takes it: once in Ray's store if it is large."""
        large = sum(map(num_bytes, common)) > LARGE
        shared: object = self._ray.put(common) if large else common
        return shared

    def give(self, parcel: Sequence[Sent], common: object, *, several: bool) -> Ticket:
        """Give an idle worker, of which there must be one, a parcel to serve; arguments as `SiteWorker.serve` has them."""
        worker = self._idle.pop()
        ticket = worker.serve.remote(parcel, common, several=several)
        self._busy[ticket] = worker
        return ticket

    def done(self, timeout: float) -> list[tuple[Ticket, Answered | Exception]]:
        """Parcels that were served since, after at most ``timeout`` seconds of waiting for the first."""
        ready, _ = self._ray.wait(list(self._busy), timeout=None if math.isinf(timeout) else timeout)
        return [(ticket, self._result(ticket)) for ticket in ready]

    def _result(self, ticket: Ticket) -> Answered | Exception:
        worker = self._busy.pop(ticket)
        found: Answered | Exception
        try:
            found = self._ray.get(ticket)
        except self._ray.exceptions.RayTaskError as fault:
            found = fault
        except self._ray.exceptions.RayError as death:
            self._all.remove(worker)
            found = death
        if worker in self._all:
            self._idle.append(worker)
        return found
