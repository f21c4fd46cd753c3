"""The light install, of a site or a server: no Ray, no matplotlib, no scikit-learn. What needs one says so in a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.commands import without_waiting
from tests.deployment.texts import save_texts, text_run
from tests.install.made import Install

HEAVY = {  # distribution -> module
    **{"ray": "ray", "matplotlib": "matplotlib", "scikit-learn": "sklearn", "seaborn": "seaborn"},
    **{"flwr-datasets": "flwr_datasets", "dp-accounting": "dp_accounting", "pytest": "pytest"},
    **{"tensorboard": "tensorboard", "wandb": "wandb", "mlflow-skinny": "mlflow", "mkdocs": "mkdocs"},
}
IMPORT_ALL = """
import importlib, pkgutil, sys
from importlib.util import find_spec
import lalora_flwr
assert "site-packages" in lalora_flwr.__file__, lalora_flwr.__file__
for module in pkgutil.walk_packages(lalora_flwr.__path__, "lalora_flwr."):
    name = module.name.rpartition(".")[2]
    if name not in ("__main__", "mlflow", "tensorboard", "wandb"):  # trackers: each of the last is its library
        importlib.import_module(module.name)
print(len([name for name in sys.modules if name.startswith("lalora_flwr.")]))
print([name for name in sys.argv[1:] if find_spec(name)])
"""


def one_line(install: Install, folder: Path, *command: str) -> str:
    """What a command says that is refused."""
    done = install.run(folder, *command)
    lines = without_waiting(done.stderr).splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("lalora: "), done.stdout + done.stderr
    return lines[0]


def test_the_heavy_libraries_are_not_among_what_it_leads_to(light: Install) -> None:
    assert not light.held & set(HEAVY)
    assert {"flwr", "torch", "datasets", "opacus", "peft"} <= light.held


def test_every_module_can_be_imported(light: Install, tmp_path: Path) -> None:
    done = light.run(tmp_path, "python", "-W", "ignore", "-c", IMPORT_ALL, *HEAVY.values())
    assert done.returncode == 0, done.stderr
    count, found = done.stdout.splitlines()[-2:]
    assert int(count) > 200 and found == "[]"


def test_ray_is_named_with_its_extra_and_what_works_without(light: Install, tmp_path: Path) -> None:
    said = one_line(light, tmp_path, "lalora", "run")
    assert said == 'lalora: --engine ray: needs Ray; pip install "lalora-flwr[simulation]"; --engine inline works without'
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_other_uses_name_theirs(light: Install, tmp_path: Path) -> None:
    said = one_line(light, tmp_path, "lalora", "run", "--engine", "inline")
    assert said == "lalora: data.name = 'digits': needs scikit-learn; pip install \"lalora-flwr[simulation]\""
    said = one_line(light, tmp_path, "lalora", "plan", "--data", "--plot", "who.png")
    assert said == 'lalora: --plot: needs matplotlib; pip install "lalora-flwr[plots]"'
    file = save_texts(tmp_path / "all.csv", 60, seed=1)
    keys = f"data.name=file:{file} data.partition=dirichlet model.name={text_run(tmp_path)['model.name']} num-supernodes=2"
    said = one_line(light, tmp_path, "lalora", "plan", "--data", "-c", keys)
    assert said == "lalora: data.partition = 'dirichlet': needs flwr-datasets; pip install \"lalora-flwr[simulation]\""


@pytest.mark.slow
def test_a_run_on_a_file_with_its_plan_its_certificate_and_its_report(light: Install, tmp_path: Path) -> None:
    save_texts(tmp_path / "all.csv", 60, seed=1)
    keys = {**text_run(tmp_path), "data.name": f"file:{tmp_path / 'all.csv'}", "data.records": 60}
    (tmp_path / "run.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()))
    planned = light.run(tmp_path, "lalora", "plan", "--config", "run.toml", "--data")
    assert planned.returncode == 0 and "noise multiplier" in planned.stdout, planned.stderr
    assert 'plots: needs matplotlib; pip install "lalora-flwr[plots]"' in planned.stdout
    done = light.run(tmp_path, "lalora", "run", "--engine", "inline", "--config", "run.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count('plots: needs matplotlib; pip install "lalora-flwr[plots]"') == 1
    run = tmp_path / "runs" / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rounds"] == 2 and {"accuracy", "f1", "matthews"} <= set(summary)
    assert (run / "adapter" / "adapter_config.json").exists() and not (run / "plots").exists()
    assert "needs matplotlib" in next(path.read_text() for path in run.glob("*.log"))
    verified = light.run(tmp_path, "lalora", "verify", str(run))
    assert verified.returncode == 0, verified.stdout + verified.stderr
    reported = light.run(tmp_path, "lalora", "report", str(run))
    assert reported.returncode == 0 and "needs matplotlib" in reported.stdout, reported.stdout + reported.stderr
    assert (tmp_path / "report" / "results.md").exists() and not list((tmp_path / "report" / "plots").iterdir())
