"""A ledger for each test; a file whose tests want a used one says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ledger.site_ledgers import new_ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return new_ledger(tmp_path)
