"""One wheel and its environments for all tests in this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.install.made import Install, install, wheel


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    return wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def light(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Install:
    """What a site or a server installs: the package without extras."""
    return install(tmp_path_factory.mktemp("light") / "venv", built)


@pytest.fixture(scope="session")
def simulating(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Install:
    """With the extras that the default run needs."""
    return install(tmp_path_factory.mktemp("simulating") / "venv", built, "[simulation,plots]")
