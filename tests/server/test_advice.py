"""Runs that are possible and spend their budget on nothing, or promise little, are warned of in one line each."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.processors import check_threads, processors
from lalora_flwr.privacy.noise import mechanism_for
from lalora_flwr.server.advice import advice
from lalora_flwr.server.plan import make_plan
from lalora_flwr.server.run import run_federation
from tests.conftest import small
from tests.models.folders import save_images, save_timm


def lines(folder: Path, smallest: int | None = None, **overrides: Any) -> list[str]:
    settings = small(folder, **overrides)
    return advice(settings, make_plan(settings), smallest)


def test_an_ordinary_run_has_no_warning(tmp_path: Path) -> None:
    assert lines(tmp_path) == []


@pytest.mark.parametrize(("batch", "smallest", "said"), [(366, None, True), (365, None, False), (40, 40, True), (40, 41, False)])
def test_a_batch_of_all_records_is_no_sampling(batch: int, smallest: int | None, said: bool, tmp_path: Path) -> None:
    records = make_plan(small(tmp_path)).records
    assert records == 366
    found = lines(tmp_path, smallest, train__batch_size=batch)
    warned = [
        line for line in found if line.startswith(f"train.batch-size = {batch}: the smallest site has {smallest or records}")
    ]
    assert bool(warned) == said and len(found) == len(warned)


def test_a_delta_of_one_record_is_too_large(tmp_path: Path) -> None:
    (line,) = lines(tmp_path, smallest=100, privacy__delta=0.01)
    assert line.startswith("privacy.delta = 0.01: not below 1 / 100 records")
    assert lines(tmp_path, smallest=100, privacy__delta=0.0099) == []


def test_noise_for_rounds_that_a_site_does_not_serve_is_named_with_its_remedy(tmp_path: Path) -> None:
    run: dict[str, Any] = {"num_rounds": 6, "num_supernodes": 4, "fraction_train": 0.5}
    (line,) = lines(tmp_path, **run)
    rounds, needed, now = re.fullmatch(
        r"fraction-train = 0\.5: .*privacy\.max-rounds = (\d+) needs σ = ([\d.]+), not ([\d.]+)", line
    ).groups()  # type: ignore[union-attr]
    assert rounds == "3" and float(needed) < float(now)
    limited = small(tmp_path, **run, privacy__max_rounds=3)
    assert mechanism_for(limited, make_plan(limited).records).noise_multiplier == pytest.approx(float(needed), abs=1e-3)
    assert lines(tmp_path, **run, privacy__max_rounds=3) == []


def test_a_new_head_that_stays_random_is_named(tmp_path: Path) -> None:
    save_timm(tmp_path / "model", "vit")
    save_images(tmp_path / "images", ("red", "green"), 200)
    run: dict[str, Any] = {"model__name": f"timm/{tmp_path / 'model'}", "data__name": f"file:{tmp_path / 'images'}"}
    assert [line[:24] for line in lines(tmp_path, **run, lora__head="frozen")] == ["lora.head = 'frozen': th"]
    for head in ("auto", "trained"):
        assert lines(tmp_path, **run, lora__head=head) == []
    plan = make_plan(small(tmp_path, **run, lora__head="auto"))
    assert (plan.head, plan.new_head) == ("trained", True)


def test_without_privacy_there_is_no_budget_to_spend(tmp_path: Path) -> None:
    assert lines(tmp_path, privacy__epsilon=math.inf, train__batch_size=9999, privacy__delta=0.1) == []


@pytest.mark.parametrize(
    ("schedule", "rounds", "steps"), [("A", 9, 9), ("step:AAB", 9, 2), ("round:AB", 1, 3), ("round:A3B", 3, 3)]
)
def test_a_run_that_never_trains_b_is_refused_before_a_step(schedule: str, rounds: int, steps: int, tmp_path: Path) -> None:
    settings = small(tmp_path, lora__schedule=schedule, num_rounds=rounds, train__local_steps=steps)
    for refused in (lambda: make_plan(settings), lambda: run_federation(settings, grid=None)):  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"^lora\.schedule = .*no step of the run trains lora_B"):
            refused()


@pytest.mark.parametrize(("schedule", "rounds", "steps"), [("step:AAB", 9, 3), ("round:AB", 2, 1), ("B", 1, 1)])
def test_a_run_that_trains_b_once_is_not(schedule: str, rounds: int, steps: int, tmp_path: Path) -> None:
    make_plan(small(tmp_path, lora__schedule=schedule, num_rounds=rounds, train__local_steps=steps))


def test_a_rank_above_every_layer_is_refused(tmp_path: Path) -> None:
    make_plan(small(tmp_path, lora__rank=80))
    with pytest.raises(ConfigError, match=r"^lora\.rank = 81: above the smaller side of every layer it adapts, at most 80$"):
        make_plan(small(tmp_path, lora__rank=81))


def test_more_threads_than_processors_are_refused() -> None:
    check_threads(processors())
    check_threads(3, available=3)
    with pytest.raises(ConfigError, match=r"^train\.num-threads = 999: this machine has \d+ processors"):
        check_threads(999)
