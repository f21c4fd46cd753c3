"""A merge of another package that does not keep to its interface stops the run in one line; nothing of it is kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lalora_flwr.ground.errors import RunFailed
from lalora_flwr.methods.merges import Mean, Memory, Merged, Now
from lalora_flwr.methods.updates import Tensors, Updates
from lalora_flwr.settings.choices import MERGES
from tests.conftest import Spy, run_spied, small, strict_json


class Spoilt(Mean):
    """The mean, with something wrong."""

    def __init__(self, name: str, **wrong: Any) -> None:
        self.name, self._wrong = name, wrong

    def __call__(self, current: Tensors, updates: Updates, memory: Memory, now: Now) -> Merged:
        tensors: Mapping[str, Any] = super().__call__(current, updates, memory, now).tensors
        first = next(iter(tensors))
        match self._wrong:
            case {"shape": _}:
                tensors = {**tensors, first: tensors[first][:1]}
            case {"value": value}:
                tensors = {**tensors, first: np.full_like(tensors[first], value)}
            case {"slot": name}:
                tensors = {**tensors, name: np.zeros(1, np.float32)}
        return Merged(tensors, Memory(self._wrong.get("notes", {})), self._wrong.get("directive", {}))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "shape": ({"shape": 1}, r"has the shape \(1, \d+\), not \("),
    "NaN": ({"value": np.nan}, "holds values that are not finite"),
    "infinity": ({"value": np.inf}, "holds values that are not finite"),
    "slot": ({"slot": "another"}, "another is no slot of the adapter"),
    "directive": ({"directive": {"lr": np.nan}}, "its directive or its notes cannot be written"),
    "notes": ({"notes": {"score": np.zeros(2)}}, "its directive or its notes cannot be written"),
}
for case, (wrong, _) in WRONG.items():
    MERGES.register(f"test-wrong-{case}", Spoilt(f"test-wrong-{case}", **wrong))


@pytest.mark.parametrize("case", WRONG)
def test_a_broken_merge_stops_the_run(case: str, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=f"^round 1: the merge 'test-wrong-{case}' is broken: .*{WRONG[case][1]}"):
        run_spied(small(tmp_path, merge__name=f"test-wrong-{case}"), Spy())
    assert "is broken" in strict_json((tmp_path / "run" / "failure.json").read_text())["error"]
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "adapter").exists()
