"""What a missing library is called, and how to install it."""

from __future__ import annotations

import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lalora_flwr.ground.extras import EXTRAS, missing, need

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def test_what_is_installed_is_not_missing() -> None:
    for module in EXTRAS:
        assert missing(module, "a use") == ""
        need(module, "a use")


def test_what_is_not_is_named_with_the_extra_that_brings_it() -> None:
    line = 'a use: needs scikit-learn; pip install "lalora-flwr[simulation]"'
    assert missing("sklearn", "a use", find=lambda module: None) == line
    assert missing("sklearn", "a use", "another", lambda module: None) == f"{line}; another works without"


@pytest.mark.parametrize("module", EXTRAS)
def test_the_extra_does_bring_it(module: str) -> None:
    wanted = [Requirement(text) for text in PROJECT["optional-dependencies"][EXTRAS[module]]]
    names = {one.name for one in wanted} | {extra and "ray" for one in wanted for extra in one.extras}
    assert set(packages_distributions()[module]) & names
    assert not set(packages_distributions()[module]) & {Requirement(text).name for text in PROJECT["dependencies"]}
