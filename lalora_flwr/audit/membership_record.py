"""What attacks on finished adapters found, as ``membership.json`` keeps it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.files import read_small

FILE = "membership.json"
RESOLVED = 1000  # non-members, from which on 0.1 % of them is a record


@dataclass(frozen=True)
class Attacked:
    """One attack on one kind of records.

    Attributes:
        records: ``real``, ``mislabelled``, ``random inputs`` or ``gradient``.
        attack: ``loss``, for gradients ``movement``, ``lira`` or ``lira offline``.
        members, non_members: scores of records inside and outside, over all attacked runs.
        auc: how often a member scores above a non-member.
        alarms: non-members above the threshold at 0.1 % false positives.
        tpr: share of the members above it.
        tpr_lower, fpr_upper: limits of both rates at 95 %, by Clopper and Pearson.
        epsilon_if_independent: ε at least by Clopper-Pearson, all attacks together at 95 %, if no record's score depended on
            another's, as those under one adapter do a little.
        epsilon_one_run: ε at least by Steinke's bound, all together at 95 %, which holds as it is; None without coins.
    """

    records: str
    attack: str
    members: int
    non_members: int
    auc: float
    alarms: int
    tpr: float
    tpr_lower: float
    fpr_upper: float
    epsilon_if_independent: float
    epsilon_one_run: float | None

    @property
    def at_few_alarms(self) -> str:
        """The true positives at 0.1 % false ones, and how far that can be said."""
        rate = f"{self.tpr:.2%}, at least {self.tpr_lower:.2%}"
        if self.non_members < RESOLVED:
            return f"{rate} (not resolved: 0 of {self.non_members} is up to {self.fpr_upper:.2%})"
        return f"{rate} ({self.alarms} of {self.non_members}, up to {self.fpr_upper:.2%})"


@dataclass(frozen=True)
class MembershipRecord:
    """Membership inference on finished adapters.

    Attributes:
        version: of this package.
        date: when it ended, ISO 8601, UTC.
        strategy, trust: of the run.
        epsilon, delta: what is claimed, of one site; ε may be infinite.
        own_run: it was a finished run's own adapter; else runs were made for it, whose members fair coins chose.
        attacked_runs, shadow_runs: how many.
        auc_before: of the loss of the model before training, where members are not chosen by coins; None elsewhere.
        attacks: the results.
        seconds: it took.
    """

    version: str
    date: str
    strategy: str
    trust: str
    epsilon: float
    delta: float
    own_run: bool
    attacked_runs: int
    shadow_runs: int
    auc_before: float | None
    attacks: Sequence[Attacked]
    seconds: float

    @property
    def strongest(self) -> Attacked:
        """The attack with the largest bound, or with the largest AUC if none has a bound."""
        return max(self.attacks, key=lambda one: (one.epsilon_if_independent, one.auc))

    @property
    def refuted(self) -> bool:
        """Whether the claim is false, by the bound that takes nothing for granted."""
        return max(one.epsilon_one_run or 0.0 for one in self.attacks) > self.epsilon

    @property
    def sentence(self) -> str:
        """The result in one sentence."""
        best = self.strongest
        shown = f"the strongest attack, {best.attack} on {best.records} records, has AUC {best.auc:.3f}"
        shown += f" and implies ε ≥ {best.epsilon_if_independent:.3g} if records are independent"
        if self.own_run:
            shown += f" and members and test records alike (AUC {self.auc_before:.3f} before training)"
        if self.refuted:
            bound = max(one.epsilon_one_run or 0.0 for one in self.attacks)
            return f"the claim of ε = {self.epsilon:g} at δ = {self.delta:g} is false: ε ≥ {bound:.3g} at 95 % confidence"
        if not math.isfinite(self.epsilon):
            return f"no ε is claimed: {shown}"
        return f"{shown}; claimed is ε = {self.epsilon:g}; a weak attack is no proof of privacy"


def read(path: Path) -> MembershipRecord:
    """
    Raises:
        ConfigError: it is not there, or damaged.
    """
    try:
        values = json.loads(read_small(path))
        values["epsilon"] = float(values["epsilon"])
        values["attacks"] = [Attacked(**one) for one in values["attacks"]]
        record = MembershipRecord(**values)
        if not (record.attacks and record.sentence):
            raise TypeError("it holds no attack")
        return record
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as fault:
        raise ConfigError(f"{path}: no attack that can be read ({' '.join(str(fault).split())})") from None
