"""Real sites, and the stamps that Flower's messages need."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.supercore.task_identity import TaskIdentity

from tests.ledger.site_ledgers import owned
from tests.site.failures import MakeContext, MakeReal


@pytest.fixture(autouse=True)
def _stamps() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # Flower stamps messages with them


@pytest.fixture
def real(context: MakeContext, tmp_path: Path) -> MakeReal:
    """The context of a real site, with a ledger and caps; ``changed`` is what its node-config says differently."""
    return lambda settings, **changed: owned(context(settings), tmp_path, **changed)
