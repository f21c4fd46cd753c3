"""Which factor trains at server round t and local step k.

Grammar of the run-config key ``lora.schedule``:

    both          A and B at every step
    B  or  A      that factor only
    step:BA       by local step: B, A, B, A, …; any pattern: step:AB, step:BBA, step:B3A2 (three B steps, two A steps)
    round:BA      by server round: B in round 1, A in round 2, …; any pattern likewise
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from lalora_flwr.ground.errors import ConfigError

Factors = frozenset[str]
BOTH: Factors = frozenset("AB")


@dataclass(frozen=True)
class Schedule:
    """A repeating pattern of trained factors, advanced by local step or by server round."""

    by: Literal["step", "round"]
    pattern: tuple[Factors, ...]

    def active(self, server_round: int, step: int) -> Factors:
        """Factors that train: round counts from 1, step from 0 within the round."""
        index = step if self.by == "step" else server_round - 1
        return self.pattern[index % len(self.pattern)]

    def trained_in(self, server_round: int, local_steps: int) -> Factors:
        """Factors that train at least once in the round."""
        return frozenset().union(*(self.active(server_round, k) for k in range(min(local_steps, len(self.pattern)))))

    @property
    def ever_trained(self) -> Factors:
        """Factors that train at least once in a long enough run."""
        return frozenset().union(*self.pattern)


def parse_schedule(text: str) -> Schedule:
    """Parse the grammar above.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    if text == "both":
        return Schedule("step", (BOTH,))
    if text in ("A", "B"):
        return Schedule("step", (frozenset(text),))
    match = re.fullmatch(r"(step|round):((?:[AB](?:[1-9]\d{0,2})?)+)", text)
    if match is None:
        raise ConfigError(
            f"lora.schedule = {text!r}: must be auto, both, B, A, step:<pattern> or round:<pattern> with a pattern of the "
            "letters A and B such as BA, BBA or B3A2"
        )
    letters = "".join(letter * int(count or 1) for letter, count in re.findall(r"([AB])(\d*)", match.group(2)))
    return Schedule("step" if match.group(1) == "step" else "round", tuple(frozenset(letter) for letter in letters))
