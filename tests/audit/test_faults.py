"""The audit has teeth: each planted fault is noticed, by what the table in ``docs/audit.md`` says."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lalora_flwr.audit.audit import Parts, _AsOfAVirtualSite, audit
from lalora_flwr.audit.observer import Observer
from lalora_flwr.audit.record import AuditRecord
from lalora_flwr.privacy.counting import Ledger
from lalora_flwr.privacy.mechanism import Mechanism, PrivateSum
from lalora_flwr.privacy.randomness import RandomSource
from tests.audit.faults import BOUND, FAULTS, SHIFT
from tests.conftest import MODELS, small

ROOT = Path(__file__).parents[2]
RUN: dict[str, Any] = {"num_supernodes": 3, "num_rounds": 2, "train__local_steps": 5, "privacy__epsilon": 3.0}
RUN |= {"lora__targets": "auto", "lora__rank": 4}


def steady() -> Parts:
    """The package's own parts; what the operating system would draw is the same each time, so that no test fails by chance."""
    source = random.Random(5)
    return Parts(draws=lambda: _AsOfAVirtualSite(source.randbytes))


def audited(folder: Path, parts: Parts | None = None, seed: int = 0, **settings: Any) -> AuditRecord:
    return audit(small(folder, **{**RUN, **settings}), parts or steady(), np.random.default_rng(seed), MODELS)


def noticed(record: AuditRecord) -> set[str]:
    bound = {BOUND} if record.clopper_pearson > record.epsilon else set()
    return {name for name, fault in record.contracts.items() if fault} | bound


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    record = audited(tmp_path, fault.parts, **fault.settings)
    assert noticed(record) >= fault.caught and not record.survived
    assert ("is false" if BOUND in fault.caught else "not kept") in record.sentence or BOUND not in fault.caught


@pytest.mark.parametrize("name", ["no clip", "records drawn twice as often", "the same batch at every step"])
def test_a_fault_is_noticed_where_a_record_has_gradients_at_two_points(name: str, tmp_path: Path) -> None:
    record = audited(tmp_path, FAULTS[name].parts, strategy="dp-lora", filter__name="kalman")
    assert noticed(record) >= FAULTS[name].caught and not record.survived


def test_a_record_that_takes_part_twice_is_noticed_there_too(tmp_path: Path) -> None:
    class Double(PrivateSum):
        def add(self, per_sample: Mapping[str, Tensor]) -> None:
            super().add(per_sample)
            super().add(per_sample)

    kalman = {"strategy": "dp-lora", "filter__name": "kalman"}
    assert SHIFT in noticed(audited(tmp_path, Parts(make_sum=Double), **kalman))
    observer = Observer(np.random.default_rng(0), 100, {0: 60}, only_first=False, ahead=True)
    for passes, drawn in ((1, 3), (2, 3), (2, 3), (4, 6)):  # the first step's memory is empty; the last step does it twice
        observer.make_sum(Mechanism(1.0, 1.0, 0.5, 30.0), {"a": torch.Size([100])}, torch.device("cpu"))
        for _ in range(passes):
            observer.drawn(torch.tensor([1, 2, 3]))
        assert len(observer.sites[0].steps[-1].drawn) == drawn


def test_an_honest_site_survives(tmp_path: Path) -> None:
    record = audited(tmp_path)
    assert record.survived and noticed(record) == set() and "survived" in record.sentence


def test_the_table_in_the_docs_is_this_one() -> None:
    text = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE))
    assert {name: "; ".join(sorted(fault.caught)) for name, fault in FAULTS.items()}.items() <= rows.items()


def test_a_site_that_fails_in_the_middle_of_a_step_is_no_crash(tmp_path: Path) -> None:
    class Failing(PrivateSum):
        def release(self, ledger: Ledger, source: RandomSource) -> dict[str, Tensor]:
            if len(made) > 3:
                raise RuntimeError("a fault of this machine")
            return super().release(ledger, source)

    made: list[Failing] = []

    def make(*about: Any) -> PrivateSum:
        made.append(Failing(*about))
        return made[-1]

    record = audited(tmp_path, Parts(make_sum=make), num_rounds=1)
    assert not record.survived and "sites failed" in record.contracts["the server takes the replies"]
