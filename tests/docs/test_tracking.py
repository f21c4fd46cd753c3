"""docs/tracking.md: its commands run, and its tables name what is written."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lalora_flwr.settings import settings_from
from lalora_flwr.settings.choices import TRACKERS
from tests.conftest import small
from tests.server.test_tracking import run

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "tracking.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", DOC, re.DOTALL) for line in block.splitlines()]
CODE = re.search(r"```python\n(.*?)```", DOC, re.DOTALL)


def runs() -> list[str]:
    return [*(line for line in COMMANDS if "lalora run" in line), *re.findall(r"`(lalora run --engine[^`]*)`", DOC)]


def test_the_page_shows_every_tracker_and_nothing_else_to_install() -> None:
    shown = re.findall(r"^\| `([a-z]+)` \| ", DOC, re.MULTILINE)
    assert shown[1:] == [name for name in TRACKERS.names() if name in ("tensorboard", "wandb", "mlflow")]
    assert COMMANDS[0] == 'pip install "lalora-flwr[tracking]"' and "tensorboard --logdir runs" in COMMANDS  # starts a web server
    assert len(runs()) == 3


def test_the_tables_name_every_metric() -> None:
    for file, prefix in (("server", "lalora_run_"), ("site", "lalora_site_")):
        written = set(re.findall(rf'"({prefix}[a-z_]+)"', (ROOT / "lalora_flwr" / file / "monitoring.py").read_text()))
        table = {name for row in DOC.splitlines() if row.startswith("| `") for name in re.findall(rf"{prefix}[a-z_]+", row)}
        assert table == written, file


def test_the_tracker_of_the_page_follows_a_run(tmp_path: Path) -> None:
    assert CODE is not None
    names: dict[str, type] = {}
    exec(CODE.group(1), names)
    folder = run(tmp_path, names["Lines"]())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shown = [f"{line['round']} {line['epsilon']} {line['accuracy']}" for line in lines]
    assert (folder / "lines.txt").read_text().splitlines() == shown and small(tmp_path).run_name == "run"


@pytest.mark.slow
@pytest.mark.parametrize("command", runs(), ids=lambda text: str(text)[-20:])
def test_the_commands_of_the_page_run(command: str, tmp_path: Path) -> None:
    if "track=" in command:
        pytest.importorskip("tensorboard")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    values = dict(pair.split("=", 1) for pair in shlex.split(command)[-1].split())
    settings = settings_from({name: int(value) if value.isdigit() else value for name, value in values.items()})
    folder = tmp_path / "runs" / settings.run_name
    assert (folder / "summary.json").exists()
    assert (folder / "tensorboard").exists() == bool(settings.track)
    assert (tmp_path / "lalora.prom").exists() == bool(settings.metrics_file)
    first = (folder / "flower.log").read_text().splitlines()[0]
    assert first.startswith("{") == ("LALORA_LOG" in command)
