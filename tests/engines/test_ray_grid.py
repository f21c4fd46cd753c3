"""The Ray engine's grid and what a worker does, with workers in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from lalora_flwr.engines import site_worker
from lalora_flwr.engines.parcels import Answer
from lalora_flwr.engines.ray_grid import RayGrid
from lalora_flwr.engines.ray_workers import how_many
from lalora_flwr.engines.site_worker import SiteWorker
from lalora_flwr.engines.together import SitesTogether
from lalora_flwr.engines.virtual_grid import FIRST_NODE
from lalora_flwr.ground.errors import WorkerDied
from lalora_flwr.server.run import run_federation
from lalora_flwr.server.stopping import RAY_DEATHS
from lalora_flwr.settings import Settings, flatten
from lalora_flwr.site.resident.words import FAILURE
from lalora_flwr.training.together import Company
from lalora_flwr.wire.replies import IDENTITY_QUERY
from tests.conftest import MODELS, Finished, small
from tests.engines.workers import HereWorkers

SEEING = "tests.engines.seeing:app"
REAL = "tests.sites:VIRTUAL"


def orders(*sites: int, arrays: ArrayRecord | None = None, kind: str = "train") -> list[Message]:
    records = {"arrays": arrays} if arrays else {}
    return [Message(RecordDict(records), dst_node_id=FIRST_NODE + site, message_type=kind) for site in sites]


def grid_of(workers: HereWorkers, sites: int = 6, **run_config: Any) -> RayGrid:
    workers.begin(sites, run_config)
    return RayGrid(site_worker.app_at(SEEING), sites, run_config, workers)


def sites_of(replies: Sequence[Message]) -> list[int]:
    return [reply.metadata.src_node_id - FIRST_NODE for reply in replies]


def test_sites_are_handed_the_runs_settings_and_keep_their_state() -> None:
    workers = HereWorkers(SiteWorker(SEEING), SiteWorker(SEEING))
    grid = grid_of(workers, **{"run-name": "run"})
    for count in (1, 2):
        replies = grid.send_and_receive(orders(*range(6)))
        assert sites_of(replies) == list(range(6))
        assert all(reply.content["seen"]["run-name"] == "run" for reply in replies)
        assert [reply.content["seen"]["rounds"] for reply in replies] == [count] * 6
        assert [reply.content["seen"]["sites"] for reply in replies] == [6] * 6


def test_a_round_is_spread_over_the_workers_and_what_sites_share_travels_once() -> None:
    workers = HereWorkers(SiteWorker(SEEING), SiteWorker(SEEING))
    grid, arrays = grid_of(workers), ArrayRecord([np.zeros(3)])
    grid.send_and_receive(orders(*range(5), arrays=arrays))
    assert [len(common) for common in workers.put] == [1]
    assert [sites for _, sites, _ in workers.parcels] == [[0, 1], [2, 3, 4]]
    assert all(several for _, _, several in workers.parcels)
    workers.parcels.clear()
    grid.send_and_receive(orders(*range(5), arrays=arrays))  # that app's sites go alone
    assert [sites for _, sites, _ in workers.parcels] == [[0], [1], [2], [3], [4]]


def test_sites_that_share_passes_come_in_parcels_of_whole_passes() -> None:
    worth: list[int] = [3, 3]

    class Sharing(SiteWorker):
        def serve(self, *arguments: Any, **words: Any) -> tuple[list[Answer], int]:
            return super().serve(*arguments, **words)[0], worth.pop() if worth else 0

    workers = HereWorkers(Sharing(SEEING), Sharing(SEEING))
    grid = grid_of(workers, sites=10)
    grid.send_and_receive(orders(*range(10)))
    assert [len(sites) for _, sites, _ in workers.parcels] == [5, 5]
    workers.parcels.clear()
    assert len(grid.send_and_receive(orders(*range(10)))) == 10
    assert [len(sites) for _, sites, _ in workers.parcels] == [2, 3, 2, 3]  # as many parcels for each worker


def test_who_a_site_is_no_worker_is_asked() -> None:
    workers = HereWorkers(SiteWorker(SEEING))
    replies = grid_of(workers).send_and_receive(orders(3, 5, kind=IDENTITY_QUERY))
    assert [reply.content["identity"]["site"] for reply in replies] == [3, 5] and not workers.parcels


def test_an_app_that_raises_fails_one_site_with_a_fixed_reason() -> None:
    workers = HereWorkers(SiteWorker(SEEING))
    grid, asked = grid_of(workers), orders(0, 1, 2)
    asked[1].content["fail"] = ConfigRecord({})
    replies = {reply.metadata.src_node_id - FIRST_NODE: reply for reply in grid.send_and_receive(asked)}
    assert replies[1].error.reason == FAILURE and replies[0].has_content() and replies[2].has_content()


def test_a_dead_worker_fails_its_parcel_and_gets_no_other() -> None:
    workers = HereWorkers(SiteWorker(SEEING), SiteWorker(SEEING))
    grid = grid_of(workers)
    workers.dead.add(1)
    replies = grid.send_and_receive(orders(*range(4)))
    assert ["ActorDiedError" in reply.error.reason for reply in replies if reply.has_error()] == [True, True]
    workers.parcels.clear()
    assert not any(reply.has_error() for reply in grid.send_and_receive(orders(*range(4))))
    assert {worker for worker, _, _ in workers.parcels} == {0}
    workers.dead.add(0)
    grid.send_and_receive(orders(0))
    (reply,) = grid.send_and_receive(orders(0))
    assert any(word in str(reply.error.reason) for word in RAY_DEATHS)


def test_a_straggler_is_not_waited_for_and_its_worker_serves_again_when_it_is_done() -> None:
    workers = HereWorkers(SiteWorker(SEEING), SiteWorker(SEEING))
    now = [0.0]
    workers.begin(4, {})
    grid = RayGrid(site_worker.app_at(SEEING), 4, {}, workers, clock=lambda: now[0])
    grid.send_and_receive(orders(0, 1, 2))

    def late(timeout: float) -> None:
        now[0] += 10.0

    workers.before = late
    assert sites_of(grid.send_and_receive(orders(0, 1), timeout=15.0)) == [0, 1]
    now[0] = 0.0
    assert sites_of(grid.send_and_receive(orders(0, 1), timeout=5.0)) == [0]
    assert workers.idle == 1
    replies = grid.send_and_receive(orders(2, 3))
    assert sites_of(replies) == [2, 3] and workers.idle == 2 and not workers.busy


def sharing(found: Company) -> Callable[[ClientApp], SitesTogether]:
    return lambda app: SitesTogether(app.host(), lambda learner, records, rounding: found, worth_it=0)  # type: ignore[attr-defined]


def run_on(workers: HereWorkers, settings: Settings) -> dict[str, torch.Tensor]:
    values = dict(flatten(settings))
    workers.begin(settings.num_supernodes, values)
    grid = RayGrid(site_worker.app_at(REAL), settings.num_supernodes, values, workers)
    return load_file(run_federation(settings, grid, models=MODELS) / "checkpoint" / "adapter.safetensors")


@pytest.mark.parametrize("many", [1, 2])
def test_the_adapter_is_that_of_the_inline_engine(many: int, tmp_path: Path, finished: Callable[..., Finished]) -> None:
    alone = finished()
    found = run_on(HereWorkers(*[SiteWorker(REAL) for _ in range(many)]), small(tmp_path))
    assert all(torch.equal(value, alone.checkpoint[name]) for name, value in found.items())


def test_sites_of_a_worker_share_passes(tmp_path: Path, finished: Callable[..., Finished]) -> None:
    alone = finished()
    workers = HereWorkers(SiteWorker(REAL, sharing(Company(3, 1))))
    found = run_on(workers, small(tmp_path))
    assert [sites for _, sites, _ in workers.parcels] == [[0, 1, 2]] * 2
    assert all(torch.allclose(value, alone.checkpoint[name], rtol=1e-3, atol=1e-4) for name, value in found.items())


def test_the_run_stops_where_a_worker_died(tmp_path: Path) -> None:
    workers = HereWorkers(SiteWorker(REAL))
    workers.dead.add(0)
    with pytest.raises(WorkerDied, match="round 1: the Ray worker that served site 0 died"):
        run_on(workers, small(tmp_path))


@pytest.mark.parametrize(("cpus", "gpus", "count"), [(1, 0, 5), (2, 0, 2), (3, 0, 1), (1, 0.5, 2), (8, 0, 0)])
def test_workers_fit_on_one_node_each(cpus: int, gpus: float, count: int) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 3.0, "GPU": 1.0}},
        {"Alive": True, "Resources": {"CPU": 2.0}},
        {"Alive": False, "Resources": {"CPU": 64.0}},
    ]
    assert how_many(nodes, {"num_cpus": cpus, "num_gpus": gpus}) == count
