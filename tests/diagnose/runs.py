"""A finished run's model again."""

from __future__ import annotations

from pathlib import Path

from lalora_flwr.data.records import RecordSet
from lalora_flwr.diagnose.opened import opened
from lalora_flwr.training.learner import Learner


def again(path: Path) -> tuple[Learner, RecordSet]:
    return opened(path).model()
