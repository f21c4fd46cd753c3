"""Libraries that only some uses need. The package installs without them; each belongs to one of its extras."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from lalora_flwr.ground.errors import ConfigError

EXTRAS = {
    "ray": "simulation",
    "flwr_datasets": "simulation",
    "sklearn": "simulation",
    "matplotlib": "plots",
    "bitsandbytes": "4bit",
}
NAMES = {"ray": "Ray", "flwr_datasets": "flwr-datasets", "sklearn": "scikit-learn"}


def missing(module: str, what: str, instead: str = "", find: Callable[[str], object] = find_spec) -> str:
    """One line that says how to install a library of an extra; empty if it is there. It imports nothing.

    Args:
        module: as Python imports it.
        what: the use that needs it.
        instead: what works without it.
        find: None for a module that is not there.
    """
    if find(module):
        return ""
    other = f"; {instead} works without" if instead else ""
    return f'{what}: needs {NAMES.get(module, module)}; pip install "lalora-flwr[{EXTRAS[module]}]"{other}'


def need(module: str, what: str, instead: str = "") -> None:
    """Refuse a use whose library is not there.

    Raises:
        ConfigError: with the line of `missing`.
    """
    if line := missing(module, what, instead):
        raise ConfigError(line)
