"""What a record's label is: one class, several classes, or a number. Losses, metrics and labels of each are in one file."""

from __future__ import annotations

from lalora_flwr.ground.lists import ends_of
from lalora_flwr.settings import DataSettings
from lalora_flwr.tasks.multi_label import MultiLabel
from lalora_flwr.tasks.problem import Problem
from lalora_flwr.tasks.regression import Regression
from lalora_flwr.tasks.single_label import SingleLabel


def problem_of(settings: DataSettings) -> Problem:
    """The problem that ``data.problem-type`` names."""
    if settings.problem_type == "regression":
        return Regression(*ends_of(settings.label_range))
    return MultiLabel() if settings.problem_type == "multi-label" else SingleLabel()
