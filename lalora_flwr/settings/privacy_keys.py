"""The keys of the guarantee."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lalora_flwr.settings.keys import Kind, at_least, choice, key, within

BUDGET = Kind.BUDGET


@dataclass(frozen=True)
class PrivacySettings:
    """The record-level guarantee. Nothing here may be chosen by looking at private records."""

    epsilon: float = key(
        3.0,
        "largest ε any site may spend in the run; inf trains without privacy",
        "a number from 0.01 to 100, or inf",
        lambda v: 0.01 <= v <= 100 or v == math.inf,
    )
    delta: float = key(
        1e-4,
        "δ of the guarantee; choose it well below 1 / records of a site",
        "a number from 1e-12 (below it the accountants are not exact) to 0.1",
        lambda v: 1e-12 <= v <= 0.1,
        kind=BUDGET,
    )
    clip_norm: float = within(1e-6, 1e6, 2.0, "L2 bound C on what one record adds to a step, over all its tensors together")
    clipping: str = choice(
        "norm",
        "what a record's gradient g is multiplied by: norm: min(1, C / ‖g‖); auto-s: C / (‖g‖ + 0.01), so that C is a part of "
        "the learning rate; apart: as norm, lora_A to 0.44 C by itself and all else to 0.9 C, together C",
        "norm",
        "auto-s",
        "apart",
    )
    ridge_share: float = key(
        0.5,
        "with lora.head = ridge: what the ridge head would cost alone, as a share of ε; the other rounds have what it leaves",
        "a number between 0 and 1, both excluded",
        lambda v: 0 < v < 1,
    )
    accountant: str = choice(
        "pld",
        "accountant that calibrates the noise and reports ε (rdp: looser, more noise; prv: slow, for old runs)",
        "pld",
        "rdp",
        "prv",
    )
    max_rounds: int = at_least(
        0,
        0,
        "rounds any one site may serve; the noise is calibrated for them; 0: all rounds, and with trust = secure-sum one more "
        "per 20 and one for a ridge head; more than all leaves room for rounds that real sites serve twice because the server "
        "or another site died",
    )
