"""``lalora audit``: every method and transport, files and exit codes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lalora_flwr.audit.canaries import Canaries, canaries, direction, projected
from lalora_flwr.audit.record import FILE, AuditRecord, read, write
from lalora_flwr.ground.errors import ConfigError
from tests.audit.test_faults import audited, noticed
from tests.cli.commands import Lalora
from tests.cli.commands import lalora as lalora
from tests.conftest import Finished

KINDS: dict[str, dict[str, Any]] = {
    "dp-lora with a head": {"strategy": "dp-lora", "lora__head": "trained"},
    "as-lora": {"strategy": "as-lora"},
    "hetlora": {"strategy": "hetlora", "profiles": "rank=1;rank=2"},
    "fedex-lora": {"strategy": "fedex-lora"},
    "bitfit": {"strategy": "bitfit", "lora__alpha": 8.0},
    "visual-prompt": {"strategy": "visual-prompt", "lora__alpha": 8.0},
    "server steps": {"strategy": "steady-lora", "train__local_steps": 1, "num_rounds": 10},
    "secure sum": {"strategy": "steady-lora", "trust": "secure-sum", "train__local_steps": 1, "num_rounds": 10},
    "fedsa-lora": {"strategy": "fedsa-lora"},
    "fedsa-lora, secure sum": {"strategy": "fedsa-lora", "trust": "secure-sum", "train__local_steps": 1, "num_rounds": 10},
    "ridge head first": {"lora__head": "ridge", "lora__targets": "auto"},
    "auto-s, adamw, doppler": {"privacy__clipping": "auto-s", "train__optimizer": "adamw", "filter__name": "doppler"},
    "A clipped apart": {"strategy": "dp-lora", "privacy__clipping": "apart", "filter__name": "slow-a"},
    "gradients at two points": {"strategy": "dp-lora", "filter__name": "kalman", "train__max_physical_batch": 1},
    "views and parts": {"train__augmentations": 2, "train__max_physical_batch": 16},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_can_be_audited_and_survives(kind: str, tmp_path: Path) -> None:
    record = audited(tmp_path, **KINDS[kind])
    assert record.survived and noticed(record) == set()
    assert record.clopper_pearson > 0 and record.canaries >= 16 and record.strategy == KINDS[kind].get("strategy", "la-lora")


def test_directions_are_orthogonal_and_lie_in_several_tensors() -> None:
    rows = torch.zeros(7, 100)
    for canary in range(7):
        where = direction(canary, 7, 100)
        rows[canary, where] = len(range(canary, 100, 7)) ** -0.5
    assert torch.allclose(rows @ rows.t(), torch.eye(7))
    assert np.allclose(np.stack([projected(row, 7) for row in rows]), np.eye(7))


def test_a_site_has_as_many_records_as_it_declares() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        own = canaries(60, 10_000, random)
        records = own.as_records()
        assert len(records) == 60 and sorted(set(records.labels.tolist()) - {-1}) == np.flatnonzero(own.inside).tolist()
    assert canaries(1000, 80, random).count == 64 and canaries(1000, 5, random).count == 5
    assert canaries(1000, 800, random).count == 100 and isinstance(own, Canaries)


def test_a_finished_run_is_audited_into_its_folder(lalora: Lalora, finished: Any) -> None:
    run: Finished = finished()
    code, out, err = lalora("audit", str(run.path))
    record = read(run.path / FILE)
    assert (code, err) == (0, "") and record.survived and record.sentence in out and record.epsilon == 4.0
    (run.path / FILE).unlink()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["-c", "privacy.epsilon=inf"], "privacy.epsilon = inf: the run claims nothing"),
        (["nowhere"], "nowhere: no run's folder"),
        (["nowhere", "-c", "seed=1"], "name either a run's folder or settings"),
        (["-c", "strategy=none-such"], "strategy"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], line: str, lalora: Lalora) -> None:
    code, out, err = lalora("audit", *arguments)
    assert code == 2 and line in err and err.count("\n") == 1 and not out


RECORD = AuditRecord(
    "1", "2026-01-01", "la-lora", "own-noise", 3.0, 1e-5, 10, 2, 50, 1.5, float("inf"), 2.0, 1.0, {"a": ""}, True, 1.0
)


def test_a_record_comes_back_from_its_file(tmp_path: Path) -> None:
    write(RECORD, tmp_path / FILE)
    assert read(tmp_path / FILE) == RECORD
    false = dataclasses.replace(RECORD, survived=False, clopper_pearson=4.0)
    assert "is false" in false.sentence
    kept = dataclasses.replace(RECORD, survived=False, contracts={"a": "broken"})
    assert "is not kept: a: broken" in kept.sentence


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"epsilon": 1}'])
def test_a_damaged_record_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ConfigError, match=FILE):
        read(tmp_path / FILE)


@pytest.mark.parametrize("more", [(), ("--membership",)])
def test_a_place_where_no_result_can_be_written_is_refused_before_the_attack(
    more: tuple[str, ...], lalora: Lalora, tmp_path: Path
) -> None:
    for place in (tmp_path / "missing" / "found.json", tmp_path):
        code, out, err = lalora("audit", *more, "--out", str(place))
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert f"{place}: the result cannot be written there" in err
    assert not list(tmp_path.iterdir())
