"""Commands that a page mentions without running them, in lines set in by four spaces: each is one that exists."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.main import get_command

from lalora_flwr.cli.main import app
from lalora_flwr.cli.options import resolve
from lalora_flwr.compare.cells import Plan
from lalora_flwr.compare.grid import read_grid
from tests.docs.blocks import DOCS, ROOT

PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md"]


def mentioned(page: Path) -> list[list[str]]:
    """The words of each call of ours in a page; those with an ellipsis are no whole calls."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^    ((?:lalora|python) .*)$", text.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines if "…" not in line]


CALLS = [(page.name, call) for page in PAGES for call in mentioned(page)]


def test_they_are_found() -> None:
    assert len(CALLS) > 40 and {"results.md", "log.md", "audit.md", "ledger.md"} <= {page for page, _ in CALLS}


@pytest.mark.parametrize(("page", "call"), CALLS, ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_each_exists(page: str, call: list[str]) -> None:
    program, *arguments = call
    if program == "python":
        module = arguments[arguments.index("-m") + 1] if "-m" in arguments else ""
        assert find_spec(module) if module else (ROOT / arguments[0]).is_file()
        return
    name, *arguments = arguments
    called = get_command(app).commands[name]  # type: ignore[attr-defined]
    if name in ("ledger", "site"):
        called, arguments = called.commands[arguments[0]], arguments[1:]
    given = called.make_context(name, list(arguments)).params
    config, grid = (ROOT / given[key] if given.get(key) else None for key in ("config", "grid"))
    if config and config.name == "my.toml":  # the reader's own
        config = None
    if name in ("run", "plan", "audit"):
        resolve(config, given.get("override"))
    if name == "compare":
        keys = (given[key] or [] for key in ("override", "over", "tune"))
        Plan(read_grid(grid, config, *keys), Path("out") / "runs").validate()
