"""What a site's ledger must add up to."""

from __future__ import annotations

from pathlib import Path

from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.privacy.events import SampledGaussian


def total(path: Path, dataset: str = "default") -> tuple[SampledGaussian, ...]:
    return LedgerFile(path).read().book.segments(dataset)
