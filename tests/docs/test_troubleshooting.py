"""docs/troubleshooting.md quotes messages: each of them still is in the code."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import lalora_flwr
from tests.docs.messages import occurs, templates

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
OWN, _, FLOWERS = PAGE.partition("\n## What Flower says\n")
PREFIXES = ("cap: ", "node-config: ", "budget: ")  # a reason's, put in front of a text of its own


def quoted(part: str) -> list[str]:
    """The first column of the tables."""
    return re.findall(r"^\| `([^`]+)` \|", part, re.MULTILINE)


@pytest.fixture(scope="module")
def own_texts() -> set[str]:
    return templates(Path(lalora_flwr.__file__).parent.rglob("*.py"))


def test_the_page_quotes_in_the_first_column_of_every_row() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| message |")]
    assert len(rows) == len(quoted(PAGE)) > 80 and len(set(quoted(PAGE))) == len(rows)


@pytest.mark.parametrize("message", quoted(OWN))
def test_a_quoted_message_is_in_the_code(message: str, own_texts: set[str]) -> None:
    bare = next((message.removeprefix(prefix) for prefix in PREFIXES if message.startswith(prefix)), message)
    assert occurs(message, own_texts) or occurs(bare, own_texts)


def test_a_message_that_nobody_says_is_noticed(own_texts: set[str]) -> None:
    assert occurs("… = …: no such file or folder", own_texts)
    assert not occurs("… = …: no such file or directory", own_texts)
    assert not occurs("or folder … no such file", {"no such file or folder"})


def test_flowers_messages_are_flowers() -> None:
    spec = find_spec("flwr")
    assert spec and spec.submodule_search_locations
    files = Path(next(iter(spec.submodule_search_locations))).rglob("*.py")
    known = templates(path for path in files if not path.name.endswith("_pb2.py"))
    fromssl = {"CERTIFICATE_VERIFY_FAILED"}  # OpenSSL's, which Flower passes on
    missing = [message for message in quoted(FLOWERS) if message not in fromssl and not occurs(message, known)]
    assert not missing
