"""``lalora audit --membership``: files, lines and exit codes, and that it sees more where there is no noise."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lalora_flwr.api import membership
from lalora_flwr.audit.attacks import auc
from lalora_flwr.audit.membership import attack_settings
from lalora_flwr.audit.membership_record import FILE, Attacked, MembershipRecord, read
from lalora_flwr.audit.planted import MISLABELLED, pool_of
from lalora_flwr.audit.record import write
from lalora_flwr.audit.shadows import all_runs, some_runs
from lalora_flwr.audit.verify import verify
from lalora_flwr.ground.errors import ConfigError, RunFailed
from lalora_flwr.settings import flatten
from tests.cli.commands import Lalora, pairs
from tests.cli.commands import lalora as lalora
from tests.conftest import MODELS, Finished, small

WEAK = Attacked("real", "loss", 1100, 297, 0.53, 0, 0.002, 0.0, 0.0101, 0.0, None)
RECORD = MembershipRecord("1", "2026-01-01", "la-lora", "own-noise", 3.0, 1e-4, True, 1, 24, 0.5, [WEAK], 1.0)


def test_a_finished_runs_own_adapter(lalora: Lalora, finished: Any) -> None:
    run: Finished = finished()
    code, out, err = lalora("audit", str(run.path), "--membership", "--runs", "3", "--workers", "1")
    record = read(run.path / FILE)
    assert (code, err) == (0, "") and record.sentence in out and "no proof of privacy" in out
    assert [(one.attack, one.members, one.non_members) for one in record.attacks] == [
        ("loss", 1100, 297),
        ("lira offline", 1100, 297),
    ]
    assert record.own_run and record.shadow_runs == 3 and all(0.4 < one.auc < 0.6 for one in record.attacks)
    assert record.auc_before is not None and 0.4 < record.auc_before < 0.6
    assert "less than one of them" in out and "0 of 297 is up to 1.00%" in out
    assert any("attacked" in line for line in verify(run.path))
    (run.path / FILE).unlink()


def test_runs_of_settings_with_canaries(lalora: Lalora, tmp_path: Path) -> None:
    given = pairs(num_rounds=1, privacy__epsilon=8.0)
    code, _, err = lalora("audit", "-c", given, "--membership", "--runs", "3", "--workers", "1", "--out", "found.json")
    record = read(tmp_path / "found.json")
    assert (code, err) == (0, "") and (record.attacked_runs, record.shadow_runs, record.own_run) == (1, 2, False)
    kinds = {(one.records, one.attack) for one in record.attacks}
    assert kinds >= {("real", "loss"), ("mislabelled", "lira"), ("random inputs", "lira offline"), ("gradient", "movement")}
    assert len(kinds) == 12 and sum(one.members + one.non_members for one in record.attacks) == 3 * 1100
    assert all(one.epsilon_one_run is not None and one.epsilon_one_run <= 8 for one in record.attacks)


@pytest.mark.slow
def test_processes_make_the_same_runs(tmp_path: Path) -> None:
    settings = small(tmp_path, num_rounds=1)
    one, two = (all_runs(settings, 3, canaries=True, workers=workers) for workers in (1, 2))
    assert np.array_equal(one.inside, two.inside) and np.array_equal(one.confidences, two.confidences)


@pytest.mark.slow
@pytest.mark.parametrize(("epsilon", "rate", "low", "high"), [(math.inf, 1.0, 0.65, 1.0), (1.0, 0.0, 0.0, 0.6)])
def test_mislabelled_records_are_seen_where_there_is_no_noise(
    epsilon: float, rate: float, low: float, high: float, tmp_path: Path
) -> None:
    """One site learns its records 35 times over; two runs, those of the table in ``docs/audit.md``."""
    shape: dict[str, Any] = {"num_supernodes": 1, "num_rounds": 1, "train__local_steps": 300, "train__batch_size": 64}
    shape |= {"lora__targets": "auto", "lora__rank": 8, "lora__alpha": 8.0, "privacy__clip_norm": 2.0}
    settings = small(tmp_path, **shape, privacy__epsilon=epsilon, train__lr=rate)
    planted = pool_of(settings, MODELS.learner(settings), plant=True).kinds == MISLABELLED
    runs = some_runs(dict(flatten(settings)), (4, 5), canaries=True).values()
    inside, confidences = (np.concatenate([run[part][planted] for run in runs]) for part in (0, 1))
    assert low < auc(confidences[inside > 0], confidences[inside == 0]) < high


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere", "--membership"], "nowhere: no run's folder"),
        (["nowhere", "--membership", "-c", "seed=1"], "name either a run's folder or settings"),
        (["--membership", "--runs", "2"], "--runs 2: must be 3 or more"),
        (["--membership", "-c", "strategy=none-such"], "strategy"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], line: str, lalora: Lalora) -> None:
    code, out, err = lalora("audit", *arguments)
    assert code == 2 and line in err and err.count("\n") == 1 and not out


def test_a_record_comes_back_from_its_file(tmp_path: Path) -> None:
    for record in (RECORD, dataclasses.replace(RECORD, epsilon=math.inf)):
        write(record, tmp_path / FILE)
        assert read(tmp_path / FILE) == record
    assert "no ε is claimed" in read(tmp_path / FILE).sentence


def test_a_claim_is_refuted_by_the_bound_that_takes_nothing_for_granted() -> None:
    strong = dataclasses.replace(WEAK, epsilon_if_independent=5.0)
    assert not dataclasses.replace(RECORD, attacks=[strong]).refuted
    false = dataclasses.replace(RECORD, own_run=False, attacks=[WEAK, dataclasses.replace(strong, epsilon_one_run=3.5)])
    assert false.refuted and "is false: ε ≥ 3.5" in false.sentence


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"epsilon": 1, "attacks": []}'])
def test_a_damaged_record_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ConfigError, match=FILE):
        read(tmp_path / FILE)


def test_a_damaged_record_is_noticed_by_verify(finished: Any) -> None:
    run: Finished = finished()
    (run.path / FILE).write_text("{}")
    with pytest.raises(RunFailed, match=FILE):
        list(verify(run.path))
    (run.path / FILE).unlink()


def test_the_same_from_python(tmp_path: Path, finished: Any) -> None:
    with pytest.raises(ConfigError, match="no run's folder"):
        membership(tmp_path, runs=3)
    with pytest.raises(ConfigError, match="--runs 1"):
        attack_settings(small(tmp_path), runs=1)
