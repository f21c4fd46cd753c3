"""Hundreds of rounds, with sites that fail and sites that are late, interrupted and resumed: nothing grows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from lalora_flwr.engines.inline import run_inline, simulated_app
from lalora_flwr.engines.simulation import run_simulation
from lalora_flwr.ground.files import replace_file
from lalora_flwr.server.metrics import RoundMetrics
from lalora_flwr.settings import Settings
from lalora_flwr.training.learner import ModelStore
from tests.conftest import small, strict_json
from tests.engines.test_ray import ROOT
from tests.faulty_client import LOOKED, fails, faltering

SITES = 4
GROWTH_MB = (
    40  # of all processes together, from a fifth of the rounds to the last: what allocators keep, and no leak of a round's
)
SPARE = 4  # files, sockets and pipes that Ray and Flower have open at one moment and not at another
Run = Callable[[Settings, Callable[[RoundMetrics], None]], Path]


def lasting(tmp_path: Path, rounds: int, **changed: Any) -> Settings:
    return small(
        tmp_path,
        **{"num_supernodes": SITES, "num_rounds": rounds, "max_failures": SITES, "train__local_steps": 1, **changed},
    )


@dataclass(frozen=True)
class Held:
    """What a run holds at the end of a round."""

    files: int  # open ones, of all its processes
    processes: int
    ports: int  # sockets that listen
    memory_mb: float
    in_folder: int

    @staticmethod
    def now(folder: Path, outside: set[int]) -> Held:
        """``outside``: processes that are not the run's."""
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        files, ports, memory = 0, 0, 0.0
        family = [member for member in family if member.pid not in outside]
        for member in family:
            with suppress(psutil.Error):
                files += member.num_fds()
                ports += sum(one.status == psutil.CONN_LISTEN for one in member.net_connections())
                memory += member.memory_full_info().uss / 2**20
        in_folder = sum(1 for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".part"))
        return Held(files, len(family), ports, memory, in_folder)


def interrupted_and_resumed(run: Run, tmp_path: Path, rounds: int) -> tuple[Path, list[Held]]:
    """The run's folder, and what the second half of it held round by round, as far as that was seen."""
    outside = {child.pid for child in psutil.Process().children(recursive=True)}

    def stop(line: RoundMetrics) -> None:
        if line.round == rounds // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(lasting(tmp_path, rounds), stop)
    held: list[Held] = []

    def look(line: RoundMetrics) -> None:
        if not (tmp_path / "run" / "adapter").exists():  # Ray's server may be ahead, and at its end
            held.append(Held.now(tmp_path / "run", outside))
        replace_file(tmp_path / "looked", str(line.round), durable=False)

    return run(lasting(tmp_path, rounds, resume=True), look), held[:-2]


def assert_flat(held: list[Held], rounds: int) -> None:
    assert len(held) >= rounds // 3
    later = held[len(held) // 5 :]
    for name in ("files", "ports", "in_folder"):
        values = [getattr(one, name) for one in later]
        assert max(values) - min(values) <= SPARE, (name, values)
    assert len({one.processes for one in later}) == 1, [one.processes for one in later]
    first, last = later[: len(later) // 4], later[-len(later) // 4 :]
    growth = min(one.memory_mb for one in last) - min(one.memory_mb for one in first)
    assert growth < GROWTH_MB, [round(one.memory_mb) for one in later]


def assert_served(folder: Path, rounds: int) -> None:
    lines = [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(1, rounds + 1))
    expected = [sum(fails(number, site) for site in range(SITES)) for number in range(1, rounds + 1)]
    assert [line["failures"] for line in lines] == expected and sum(expected) >= rounds * SITES // 40
    assert strict_json((folder / "summary.json").read_text())["failures"] == sum(expected)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def inline(settings: Settings, on_round: Callable[[RoundMetrics], None]) -> Path:
    models = ModelStore()
    return run_inline(settings, on_round, app=faltering(simulated_app(models)), models=models)


def on_ray(settings: Settings, on_round: Callable[[RoundMetrics], None]) -> Path:
    return run_simulation(settings, on_round, num_actors=2, client_app="tests.faulty_client:flaky")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv(LOOKED, str(tmp_path / "looked"))
    yield


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [60, pytest.param(500, marks=pytest.mark.nightly)])
def test_nothing_grows_inline(rounds: int, tmp_path: Path) -> None:
    folder, held = interrupted_and_resumed(inline, tmp_path, rounds)
    assert_flat(held, rounds)
    assert {one.processes for one in held} == {1} and {one.ports for one in held} == {held[0].ports}
    assert_served(folder, rounds)


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [60, pytest.param(500, marks=pytest.mark.nightly)])
def test_nothing_grows_on_ray(rounds: int, tmp_path: Path) -> None:
    folder, held = interrupted_and_resumed(on_ray, tmp_path, rounds)
    assert_flat(held, rounds)
    assert_served(folder, rounds)
