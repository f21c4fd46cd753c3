"""Installs without a network: the wheel of this checkout in a fresh environment with what its metadata asks for, and no more."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import venv
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
reached: Callable[[Iterable[str]], dict[str, Distribution]] = runpy.run_path(str(ROOT / "docker" / "pins.py"))["reached"]


def wheel(folder: Path) -> Path:
    """The wheel of this checkout, from a copy that holds nothing but the project."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in ("lalora_flwr", "lalora_assets", "README.md", "LICENSE", "pyproject.toml", ".gitignore"):
        (source / name).symlink_to(ROOT / name)
    checked([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=source)
    (built,) = folder.glob("*.whl")
    return built


def checked(command: list[str], **options: Any) -> str:
    """What a command says that has to succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@dataclass(frozen=True)
class Install:
    """A virtual environment.

    Attributes:
        folder: of it.
        held: the distributions in it besides the package.
    """

    folder: Path
    held: frozenset[str]

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        (found,) = (self.folder / "lib").glob("python3*/site-packages")
        return found

    def environment(self) -> dict[str, str]:
        """Of a process that sees this environment, and neither the checkout nor a network."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        path = os.pathsep.join([str(self.folder / "bin"), os.environ.get("PATH", "")])
        return {**kept, "PATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}

    def run(self, folder: Path, *command: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """A command of the environment, such as ``lalora``, in a folder."""
        words = [str(self.folder / "bin" / command[0]), *command[1:]]
        env = {**self.environment(), **(env or {})}
        return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


def install(folder: Path, built: Path, extras: str = "") -> Install:
    """A fresh environment with a wheel and the installed distributions that its metadata leads to.

    Args:
        folder: is made.
        built: the wheel.
        extras: as in a requirement, such as ``[plots]``.
    """
    venv.create(folder, symlinks=True)
    made = Install(folder, frozenset())
    checked([sys.executable, "-m", "pip", "--python", str(made.python), "install", "-q", "--no-deps", "--no-index", str(built)])
    (metadata,) = made.packages.glob("lalora_flwr-*.dist-info")
    held = reached(_required(PathDistribution(metadata), extras))
    for found in held.values():
        _link(found, made)
    return Install(folder, frozenset(held))


def _required(package: Distribution, extras: str) -> list[str]:
    """The requirements that the wheel's metadata states for these extras."""
    from packaging.requirements import Requirement

    wanted = Requirement(f"lalora-flwr{extras}").extras
    required, todo, seen = [], ["", *wanted], set[str]()
    while todo:
        seen.add(extra := todo.pop())
        for one in map(Requirement, package.requires or ()):
            if one.marker is not None and not one.marker.evaluate({"extra": extra}):
                continue
            if one.name == "lalora-flwr":
                todo += sorted(one.extras - seen)
            else:
                one.marker = None
                required.append(str(one))
    return required


def _link(found: Distribution, into: Install) -> None:
    """Links to a distribution's modules and metadata, and scripts for its commands."""
    for top in {path.parts[0] for path in found.files or ()} - {"..", "__pycache__"}:
        place = into.packages / top
        if not place.exists():
            place.symlink_to(str(found.locate_file(top)))
    for entry in found.entry_points.select(group="console_scripts"):
        script = into.folder / "bin" / entry.name
        script.write_text(f"#!{into.python}\nimport sys\nfrom {entry.module} import {entry.attr}\nsys.exit({entry.attr}())\n")
        script.chmod(0o755)
