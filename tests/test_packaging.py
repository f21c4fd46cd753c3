"""What a user installs and what Flower bundles: complete, small, and licensed as said."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from torch import Tensor

from lalora_flwr.data import digits
from lalora_flwr.models.embedded import ASSET_NAME, ASSET_PACKAGE, build_vit_digits

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
APP = PROJECT["tool"]["flwr"]["app"]


def modules(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in (folder / "lalora_flwr").rglob("*.py")}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The app bundle that Flower makes of what ``fab-include`` names, and of nothing else."""
    folder = tmp_path_factory.mktemp("build")
    app = folder / "lalora-flwr"
    for pattern in [*APP["fab-include"], ".gitignore"]:
        for path in ROOT.glob(pattern):
            copy = app / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    env = {**os.environ, "FLWR_HOME": str(folder / "home")}
    command = [Path(sys.executable).with_name("flwr"), "build", "--app", str(app)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.rglob("*.fab")
    return zipfile.ZipFile(built)


def test_flowers_bundle_holds_every_module(bundle: zipfile.ZipFile) -> None:
    held = {name for name in bundle.namelist() if name.endswith(".py")}
    assert held == modules(ROOT) and len(held) > 30
    for name in held:
        assert bundle.read(name) == (ROOT / name).read_bytes()


def test_flowers_bundle_holds_texts_only(bundle: zipfile.ZipFile) -> None:
    names = set(bundle.namelist())
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names
    for name in names:
        assert Path(name).suffix in {".py", ".md", ".toml", ""}, name
        bundle.read(name).decode("utf-8")
    assert sum(entry.file_size for entry in bundle.infolist()) < 2_000_000


def test_flower_finds_the_two_apps() -> None:
    for component, kind in (("serverapp", ServerApp), ("clientapp", ClientApp)):
        module, attribute = APP["components"][component].split(":")
        assert isinstance(getattr(import_module(module), attribute), kind)


def test_the_project_names_no_federation() -> None:
    """Flower rewrites a pyproject.toml that does."""
    assert "federations" not in PROJECT["tool"]["flwr"]


def test_the_command_is_installed() -> None:
    (command,) = entry_points(group="console_scripts", name="lalora")
    assert command.value == PROJECT["project"]["scripts"]["lalora"] and callable(command.load())


def test_the_license_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:5] == ["Apache", "License", "Version", "2.0,", "January"]
    for section in range(1, 10):
        assert f"\n   {section}. " in text
    assert "3. Grant of Patent License." in text and "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == {"file": "LICENSE"}


def test_the_models_weights_are_in_the_package_and_small() -> None:
    weights = files(ASSET_PACKAGE).joinpath(ASSET_NAME).read_bytes()
    assert 10_000 < len(weights) < 1_000_000
    assert ASSET_PACKAGE in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


def test_a_wheel_holds_the_weights_and_every_module(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    for name in ("lalora_flwr", "lalora_assets", "README.md", "LICENSE", "pyproject.toml", ".gitignore"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert set(zipfile.ZipFile(wheel).namelist()) >= modules(ROOT) | {f"{ASSET_PACKAGE}/{ASSET_NAME}"}


def accuracy(part: tuple[Tensor, Tensor]) -> float:
    images, labels = part
    with torch.inference_mode():
        return float((build_vit_digits()(images).argmax(-1) == labels).float().mean())


def test_the_model_knows_upright_digits_and_fails_on_turned_ones() -> None:
    assert accuracy(digits.public_part()) > 0.9
    assert accuracy(digits.test_part()) < 0.35


def test_the_parts_of_the_data_share_no_record() -> None:
    """Together they are all records in their order, each once; the private and the test part are turned."""
    images, labels = digits.all_records()
    parts = [digits.public_part(), digits.private_part(), digits.test_part()]
    sizes = [digits.PUBLIC_RECORDS, digits.PRIVATE_RECORDS, digits.TEST_RECORDS]
    assert [len(part) for part, _ in parts] == sizes and sum(sizes) == len(images) == 1797
    public, private, test = torch.split(images, sizes)
    for (held, _), expected in zip(parts, (public, digits.tilted(private), digits.tilted(test)), strict=True):
        assert torch.equal(held, expected)
    assert torch.equal(torch.cat([own for _, own in parts]), labels)
