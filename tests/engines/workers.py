"""Workers in the test's process, in place of Ray's."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Sequence
from typing import Any

from flwr.app import ArrayRecord

from lalora_flwr.engines.parcels import Answer, Sent
from lalora_flwr.engines.site_worker import SiteWorker
from lalora_flwr.settings import Value


class HereWorkers:
    """They serve a parcel when it is asked whether they are done; what passes between them and the server is pickled."""

    def __init__(self, *workers: SiteWorker) -> None:
        self.workers, self.dead, self._buried = list(workers), set[int](), set[int]()
        self.parcels: list[tuple[int, list[int], bool]] = []  # worker, sites, and whether there are several
        self._idle, self._tickets = list(range(len(workers))), itertools.count()
        self.busy: dict[int, tuple[int, bytes]] = {}
        self.put: list[Sequence[ArrayRecord]] = []
        self.before: Callable[[float], None] = lambda timeout: None  # it looks who is done

    def begin(self, sites: int, run_config: dict[str, Value]) -> None:
        for worker in self.workers:
            worker.begin(sites, run_config)

    @property
    def alive(self) -> int:
        return len(self.workers) - len(self._buried)

    @property
    def idle(self) -> int:
        return len(self._idle)

    def shared(self, common: Sequence[ArrayRecord]) -> object:
        self.put.append(common)
        return pickle.dumps(common)

    def give(self, parcel: Sequence[Sent], common: Any, *, several: bool) -> int:
        ticket, worker = next(self._tickets), self._idle.pop(0)
        self.parcels.append((worker, [one.site for one in parcel], several))
        self.busy[ticket] = worker, pickle.dumps((parcel, pickle.loads(common), several))
        return ticket

    def done(self, timeout: float) -> list[tuple[int, tuple[list[Answer], int] | Exception]]:
        self.before(timeout)
        ticket = next(iter(self.busy))
        worker, sent = self.busy.pop(ticket)
        if worker in self.dead:
            self._buried.add(worker)  # not known before
            return [(ticket, RuntimeError("ActorDiedError"))]
        parcel, common, several = pickle.loads(sent)
        answer = pickle.loads(pickle.dumps(self.workers[worker].serve(parcel, common, several=several)))
        self._idle.append(worker)
        return [(ticket, answer)]
