"""What the server evaluates on, and whether that can tell a good model from a bad one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lalora_flwr.data.records import ReadLate, RecordSet
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.server.metrics import HEADLINES, Quality, headline


def tested(test: RecordSet, left_out: Mapping[str, int]) -> dict[str, Any]:
    """What a summary says of the public records."""
    broken = test.unreadable() if isinstance(test, ReadLate) else 0
    others = {**left_out, **({"its image cannot be read": broken} if broken else {})}
    return {"test_records": len(test) - broken, "test_left_out": others}


def check_measurable(quality: Quality) -> None:
    """
    Raises:
        ConfigError: the test records cannot tell a good model from a bad one.
    """
    metric = headline(quality)
    if metric != "accuracy" and not math.isfinite(quality[metric] or 0.0):
        raise ConfigError(
            f"data.test: {HEADLINES[metric]} is not defined on the test records, which all have the same label; take others"
        )
