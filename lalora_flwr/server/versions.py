"""Which code made a result."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

PACKAGE = "lalora-flwr"


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of all packages that it needs."""
    try:
        needed = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requires(PACKAGE) or () if "extra ==" not in line]
    except PackageNotFoundError:
        needed = []
    found = {"python": platform.python_version()}
    for package in (PACKAGE, *sorted(needed)):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """The commit of the checkout that this package runs from, with ``+`` if files differ; empty if it was installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        known = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return known.stdout.strip() + ("+" if changed.stdout.strip() else "") if known.returncode == 0 else ""
