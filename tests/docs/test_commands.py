"""Commands of pages: each parses; each that a test machine can run is run, those of docs/operate.md by test_operate.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from lalora_flwr.cli.main import app
from tests.docs.blocks import Block, blocks

RUN_HERE = ("index", "choose", "dpo", "reproduce", "api")
LONG = ("choose", "reproduce")  # of them: comparisons, which take minutes
PAGES = (*RUN_HERE, "operate", "troubleshooting")
SAID = [(page, block) for page in PAGES for block in blocks(page)]


@pytest.mark.parametrize(("page", "block"), SAID)
def test_a_block_is_bash_and_names_commands_that_exist(page: str, block: Block) -> None:
    subprocess.run(["bash", "-n", "-c", block.text], check=True)
    for name, *arguments in block.commands("lalora"):
        called = get_command(app).commands[name]  # type: ignore[attr-defined]
        if name in ("ledger", "site"):
            called, arguments = called.commands[arguments[0]], arguments[1:]
        if arguments != ["--help"]:
            called.make_context(name, list(arguments))


def test_a_block_that_is_not_run_says_why() -> None:
    left_out = [block for _, block in SAID if block.needs]
    assert all(len(block.needs.split()) > 1 for block in left_out)
    assert len(left_out) < len(SAID) / 2


@pytest.mark.slow
@pytest.mark.parametrize("page", [pytest.param(page, marks=[pytest.mark.nightly] * (page in LONG)) for page in RUN_HERE])
def test_the_commands_of_a_page_run(page: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    for name in ("experiments", "benchmarks"):
        (tmp_path / name).symlink_to(root / name)
    for block in blocks(page):
        if not block.needs:
            done = block.run(tmp_path)
            assert done.returncode == 0, block.text + done.stdout + done.stderr
    for block in blocks(page, "python"):
        done = subprocess.run([sys.executable, "-c", block.text], cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, block.text + done.stdout + done.stderr
