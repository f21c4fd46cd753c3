"""The probes, installed as any package is: what a run finds of them it finds by their entry points."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).with_name("package")


def install(folder: Path, package: Path = PACKAGE) -> Path:
    """Install a package, the probes by default, into a folder of its own, without a network, and return the folder."""
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", str(folder), str(package)], check=True)
    return folder
