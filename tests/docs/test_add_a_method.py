"""The package of docs/add_a_method.md, as it stands there: installed, found by its entry point, run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import strict_json
from tests.probes.installed import install

DOC = (Path(__file__).parents[2] / "docs" / "add_a_method.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"`([\w.]+)`\n\n```(?:toml|python)\n(.*?)```", DOC, re.DOTALL))
COMMANDS = re.search(r"```bash\n(.*?)```", DOC, re.DOTALL)


def test_the_page_shows_a_whole_package() -> None:
    assert set(FILES) == {"pyproject.toml", "damped_lora.py"} and COMMANDS


@pytest.mark.slow
def test_the_package_of_the_page_runs_by_the_commands_of_the_page(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    for name, text in FILES.items():
        (tmp_path / "package" / name).write_text(text)
    installed = install(tmp_path / "installed", tmp_path / "package")
    assert COMMANDS is not None
    pip, *commands = COMMANDS.group(1).splitlines()
    assert pip == "pip install ."  # done, without a network
    paths = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": paths, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    said = [subprocess.run(c, shell=True, cwd=tmp_path, env=env, check=True, capture_output=True, text=True) for c in commands]
    assert "damped-lora" in said[0].stdout
    assert strict_json((tmp_path / "runs" / "damped" / "summary.json").read_text())["strategy"] == "damped-lora"
