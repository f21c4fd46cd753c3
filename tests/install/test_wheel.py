"""The wheel, installed where no checkout is to be seen."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from tests.install.made import ROOT, Install


def test_the_wheel_says_that_it_is_typed(built: Path) -> None:
    names = set(zipfile.ZipFile(built).namelist())
    assert {"lalora_flwr/py.typed", "lalora_assets/py.typed"} <= names
    assert not [name for name in names if name.split("/")[0] in ("tests", "docker", "benchmarks", "experiments")]


@pytest.mark.slow
def test_the_default_run_works_without_the_checkout(simulating: Install, tmp_path: Path) -> None:
    seen = simulating.run(tmp_path, "python", "-c", "import sys, lalora_flwr; print(*sys.path, lalora_flwr.__file__, sep='\\n')")
    assert seen.returncode == 0 and not any(Path(line).is_relative_to(ROOT) for line in seen.stdout.split())
    done = simulating.run(tmp_path, "lalora", "run", "--engine", "inline", "-c", "num-rounds=2 run-name=two")
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "two"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rounds"] == 2 and summary["private"] and (run / "plots" / "accuracy.png").stat().st_size > 1000
    bundle = simulating.run(tmp_path, "flwr", "build", "--app", str(ROOT), env={"FLWR_HOME": str(tmp_path / "home")})
    assert bundle.returncode == 0 and len(list(tmp_path.glob("*.fab"))) == 1, bundle.stdout + bundle.stderr


@pytest.mark.slow
@pytest.mark.nightly
def test_ray_is_there_with_its_extra(simulating: Install, tmp_path: Path) -> None:
    done = simulating.run(tmp_path, "lalora", "run", "-c", "num-rounds=1 num-supernodes=2 run-name=ray")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "ray" / "summary.json").exists()
