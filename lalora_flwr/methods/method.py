"""What a method is: four choices, named by value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Method:
    """A federated LoRA method as four choices; the site sees the first two, the server the last two.

    Attributes:
        name: the value of the run-config key ``strategy``.
        schedule: which factor trains at round t, local step k (grammar: `lalora_flwr.methods.schedules`).
        filter: map applied to the gradient after the noise (`lalora_flwr.methods.filters`).
        merge: how the server combines what the sites send (`lalora_flwr.methods.merges`).
        share: what leaves a site: every tensor that trained in the round (``trained``), or always both factors
            (``both``). The two differ only for schedules that leave a factor alone for a whole round.
    """

    name: str
    schedule: str
    filter: Literal["none", "gauss5"]
    merge: Literal["mean", "median", "trimmed-mean"]
    share: Literal["trained", "both"]

    def merge_named(self, name: str) -> str:
        """The merge of a run whose key ``merge.name`` is ``name``."""
        return self.merge if name == "auto" else name


def least_replies(merge: str, trim: float) -> int:
    """The fewest replies among which a merge keeps at least one liar in check; 1 for the mean, which keeps none."""
    if merge == "trimmed-mean":
        return max(3, math.ceil(min(1 / trim, 1e9) - 1e-9))
    return 3 if merge == "median" else 1
