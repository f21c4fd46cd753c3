"""What an audit found, as ``audit.json`` keeps it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.files import PUBLIC, read_small, replace_file

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FILE = "audit.json"


@dataclass(frozen=True)
class AuditRecord:
    """One audit.

    Attributes:
        version: of this package.
        date: when it ended, ISO 8601, UTC.
        strategy, trust: of the run.
        epsilon, delta: what is claimed, of one site.
        steps: noised steps of a site.
        sites, canaries: how many, all sites together; about half of the canaries are among the records.
        clopper_pearson: lower bound on ε at 95 %; it decides.
        gaussian_pair, gaussian_pair_lower: an estimate of ε, and its lower limit.
        one_run: Steinke's lower bound at 95 %.
        contracts: each check, and what is wrong; empty if nothing is.
        survived: the bound is at most ε, and every contract holds.
        seconds: it took.
    """

    version: str
    date: str
    strategy: str
    trust: str
    epsilon: float
    delta: float
    steps: int
    sites: int
    canaries: int
    clopper_pearson: float
    gaussian_pair: float
    gaussian_pair_lower: float
    one_run: float
    contracts: Mapping[str, str]
    survived: bool
    seconds: float

    @property
    def sentence(self) -> str:
        """The result in one sentence."""
        claim = f"the claim of ε = {self.epsilon:g} at δ = {self.delta:g}"
        bound = f"the attack shows ε ≥ {self.clopper_pearson:.3g} at 95 % confidence"
        broken = [f"{name}: {fault}" for name, fault in self.contracts.items() if fault]
        if self.survived:
            return f"{claim} survived: {bound}, and all {len(self.contracts)} contracts hold"
        if self.clopper_pearson > self.epsilon:
            return "; ".join([f"{claim} is false: {bound}", *broken])
        return f"{claim} is not kept: {'; '.join(broken)}"


def write(record: DataclassInstance, path: Path) -> None:
    """Write what an audit or an attack found, atomically; a number without end is written as the text ``inf``.

    Raises:
        OSError: it cannot be written; the old content is then still there.
    """
    values = {name: "inf" if value == math.inf else value for name, value in asdict(record).items()}
    replace_file(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n", mode=PUBLIC)


def read(path: Path) -> AuditRecord:
    """
    Raises:
        ConfigError: it is not there, or damaged.
    """
    try:
        values: dict[str, Any] = {
            name: math.inf if value == "inf" else value for name, value in json.loads(read_small(path)).items()
        }
        record = AuditRecord(**values)
        numbers = (record.epsilon, record.delta, record.clopper_pearson, record.gaussian_pair, record.one_run, record.seconds)
        if not all(isinstance(number, int | float) for number in numbers) or not isinstance(record.contracts, dict):
            raise TypeError("a number is none")
        return record
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as fault:
        raise ConfigError(f"{path}: no audit that can be read ({' '.join(str(fault).split())})") from None
