"""Which records are public: a share of the private ones, and a few of many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lalora_flwr.data.data_set import DataSets, data_set, private_records
from lalora_flwr.data.partition import site_rows
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.settings import Settings
from tests.data.files import column, keep, settings, write_csv
from tests.data.reviews import numbered, private, public


def hold_out(folder: Path, share: str = "0.25", **more: Any) -> Settings:
    file = folder / "t.csv"
    if not file.exists():
        write_csv(file, numbered(40))
    return settings(name=f"file:{file}", test=f"hold-out:{share}", **more)


def test_held_out_records_are_taken_from_the_sites(tmp_path: Path) -> None:
    wanted = hold_out(tmp_path)
    own, held = private(wanted), public(wanted)
    assert len(held) == 10 and not set(own) & set(held)
    assert sorted(own + held) == sorted(text for text, _ in numbered(40))
    assert private_records(wanted) == 30
    rows = site_rows(data_set(wanted).classes(), wanted.data, 0, 3)
    shares = [column(data_set(wanted).private(part, keep)) for part in rows]
    assert sorted(text for share in shares for text in share) == sorted(own)


def test_held_out_records_are_the_same_for_every_seed_and_whatever_was_drawn_before(tmp_path: Path) -> None:
    first = public(hold_out(tmp_path))
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert public(hold_out(tmp_path, beta=float(seed)), read=DataSets()) == first
    assert hold_out(tmp_path).seed == 0  # the seed does not reach the data set at all


def test_a_share_is_at_least_one_record_and_never_all(tmp_path: Path) -> None:
    assert len(public(hold_out(tmp_path, "0.001"))) == 1
    with pytest.raises(ConfigError, match=r"^data\.test = 'hold-out:0\.999': leaves none of the 40 private records$"):
        data_set(hold_out(tmp_path, "0.999"))


@pytest.mark.parametrize("test", ["hold-out:0.5", "file"])
def test_so_many_test_records_are_drawn_always_the_same(tmp_path: Path, test: str) -> None:
    file, name = tmp_path / "test.csv", f"file:{write_csv(tmp_path / 't.csv', numbered(40))}"
    write_csv(file, numbered(20))
    test = f"file:{file}" if test == "file" else test
    everything = public(settings(name=name, test=test))
    some = public(settings(name=name, test=test, test_records=7))
    torch.manual_seed(5)
    again = public(settings(name=name, test=test, test_records=7), read=DataSets())
    assert len(some) == 7 and set(some) < set(everything) and again == some
    assert some != everything[:7]
    assert public(settings(name=name, test=test, test_records=99)) == everything
