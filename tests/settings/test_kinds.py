"""What each key is about: comparisons, resumption and reports go by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.server.folder import RunFolder
from lalora_flwr.server.place import folder_for
from lalora_flwr.settings import KEYS, Kind, keys_of
from tests.conftest import small

BUDGET = {"num-rounds", "num-supernodes", "fraction-train", "train.local-steps", "train.batch-size", "privacy.delta"}
PERFORMANCE = {
    "train.max-physical-batch",
    "train.gradient-checkpointing",
    "train.device",
    "train.num-gpus",
    "train.num-threads",
    "train.share-passes",
    "round-seconds",
}


def test_every_key_has_the_kind_that_its_users_rely_on() -> None:
    data = {name for name in KEYS if name.startswith("data.")} - {"data.records"}
    assert keys_of(Kind.BUDGET) == BUDGET | data
    assert keys_of(Kind.PERFORMANCE) == PERFORMANCE | {"max-failures", "data.records"}
    assert keys_of(Kind.PLACE) == {"output-dir", "run-name", "resume", "track", "metrics-file"}
    assert keys_of(*Kind) == set(KEYS)


def test_only_the_place_of_a_run_may_differ_when_it_goes_on(tmp_path: Path) -> None:
    with RunFolder(small(tmp_path)):
        pass
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "run").rename(moved / "renamed")
    assert folder_for(small(moved, run_name="renamed", resume=True)) == moved / "renamed"
    with pytest.raises(ConfigError, match="max-failures = 0: the run to resume has 1"):
        folder_for(small(moved, run_name="renamed", resume=True, max_failures=0))
