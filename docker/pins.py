"""The versions that the image installs: those of the environment in which the tests ran.

    python docker/pins.py > docker/constraints.txt

writes them anew, in an environment that ``pip install --upgrade --upgrade-strategy eager -e ".[dev]"`` brought up to date and
whose tests have passed. ``make`` installs by the file, and a test compares it with the environment that it runs in.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
OF_THE_GPU = ("cuda-", "nvidia-", "triton")  # torch pins them itself, and torch for CPUs has none of them
HEAD = "# Versions of the image: those that the tests run with, by docker/pins.py. torch itself pins its GPU libraries."


def reached(requirements: Iterable[str]) -> dict[str, Distribution]:
    """The installed distributions that requirements lead to, by canonical name.

    Raises:
        PackageNotFoundError: one is not installed.
    """
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    left = [Requirement(text) for text in requirements]
    while left:
        wanted = left.pop()
        name = canonicalize_name(wanted.name)
        held = found.setdefault(name, distribution(wanted.name))
        for extra in ("", *wanted.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                own = map(Requirement, held.requires or ())
                left += [one for one in own if one.marker is None or one.marker.evaluate({"extra": extra})]
    return found


def pins() -> list[str]:
    """``name==version`` of all that the package needs, without its extras, in order."""
    needed = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    return [f"{name}=={held.version}" for name, held in sorted(reached(needed).items()) if not name.startswith(OF_THE_GPU)]


if __name__ == "__main__":
    print("\n".join((HEAD, *pins())))
