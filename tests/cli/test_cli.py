"""Mistakes on the command line are one line with the way out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import NO_NOISE, Lalora, assert_one_line, pairs, real_lalora
from tests.conftest import files_in

MENDABLE: dict[str, tuple[str, ...]] = {  # what follows -c, and what the line has to name
    "privacy.epsilonn=3": ("privacy.epsilonn", "did you mean privacy.epsilon?"),
    "num-rounds=2.5": ("num-rounds = 2.5", "a whole number"),
    "model.pretrained=maybe": ("model.pretrained = 'maybe'", "true or false"),
    "lora.rank=0": ("lora.rank = 0", "from 1 to 4096"),
    "privacy.epsilon=-1": ("privacy.epsilon = -1.0", "from 0.01 to 100, or inf"),
    "privacy.epsilon=nan": ("privacy.epsilon = nan",),
    "privacy.delta=1": ("privacy.delta = 1.0", "from 1e-12"),
    "strategy=la-lorra": ("strategy = 'la-lorra'", "did you mean la-lora?"),
    "lora.schedule=AB": ("lora.schedule = 'AB'", "step:<pattern>"),
    "num-rounds": ("-c num-rounds", "key=value"),
    "num-supernodes=1101": ("num-supernodes = 1101", "1100 records"),
    "data.name=mnist": ("data.name = 'mnist'", "digits"),
    "model.name=resnet18": ("model.name = 'resnet18'", "timm/<name or folder>"),
    "model.name=timm/no_such_net": ("model.name = 'timm/no_such_net'", "no such model"),
    "lora.targets=query": ("lora.targets = 'query'", "'query'", "it has qkv, proj, fc1, fc2"),
    "model.name=timm/resnet18 model.pretrained=false": ("model.name = 'timm/resnet18'", "BatchNorm"),
}


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("override", MENDABLE)
def test_a_setting_to_mend_is_one_line_and_writes_nothing(override: str, command: str, lalora: Lalora, tmp_path: Path) -> None:
    assert_one_line(lalora(command, "-c", "output-dir=out", "-c", override), *MENDABLE[override])
    assert not list(tmp_path.iterdir())


def test_a_missing_config_file_is_one_line(lalora: Lalora, tmp_path: Path) -> None:
    for command in ("run", "plan"):
        assert_one_line(lalora(command, "--config", "missing.toml"), "--config missing.toml", "No such file")
    assert not list(tmp_path.iterdir())


def test_a_config_file_with_a_mistake_is_one_line(lalora: Lalora, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[privacy]\nepsilon = 'eight'\n")
    (tmp_path / "b.toml").write_text("a = \n = b")
    assert_one_line(lalora("run", "--config", "a.toml"), "privacy.epsilon = 'eight'")
    assert_one_line(lalora("run", "--config", "b.toml"), "--config b.toml", "not valid TOML")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.toml", "b.toml"]


@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_a_split_that_cannot_be_made_is_one_line_before_any_site_starts(engine: str, lalora: Lalora, tmp_path: Path) -> None:
    override = pairs(privacy__epsilon="inf", num_supernodes=60, data__partition="dirichlet", data__beta=0.01)
    outcome = lalora("run", "--engine", engine, "-c", override, "-c", "output-dir=out")
    assert_one_line(outcome, "data.beta = 0.01", "60 sites")
    assert not list(tmp_path.iterdir())


def test_an_output_dir_in_the_way_is_one_line(lalora: Lalora, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    assert_one_line(lalora("run", "--engine", "inline", "-c", pairs(output_dir="out", **NO_NOISE)), "output-dir = 'out'")
    assert files_in(tmp_path) == {"out": b"a file"}


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("privacy.epsilonn=3", ("did you mean privacy.epsilon?",)),
        ("privacy.delta=1", ("privacy.delta = 1.0",)),
        pytest.param("model.name=timm/resnet18 model.pretrained=false", ("BatchNorm",), marks=pytest.mark.slow),
    ],
)
def test_the_installed_command_ends_with_one_line_and_code_2(override: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    assert_one_line(real_lalora(tmp_path, "run", "-c", override), *parts)
    assert not list(tmp_path.iterdir())


def test_a_bad_setting_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from lalora_flwr.cli import main; sys.argv = ['lalora', 'run', '-c', 'lora.rank=0']\n"
        "try: main.main()\nfinally: print([m for m in ('torch', 'flwr', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "[]\n"), done.stderr
