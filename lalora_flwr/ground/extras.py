"""Libraries that only some uses need. The package installs without them; each belongs to one of its extras."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from lalora_flwr.ground.errors import ConfigError

FOUR_BITS = "bitsandbytes"
EXTRAS = {
    **dict.fromkeys(("ray", "flwr_datasets", "sklearn"), "simulation"),
    "matplotlib": "plots",
    FOUR_BITS: "4bit",
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


def need(module: str, what: str, instead: str = "", find: Callable[[str], object] = find_spec) -> None:
    """Refuse a use whose library is not there.

    Raises:
        ConfigError: with the line of `missing`.
    """
    if line := missing(module, what, instead, find):
        raise ConfigError(line)


def need_four_bits(find: Callable[[str], object] = find_spec) -> None:
    """Refuse ``model.dtype = "nf4"`` where the library is not there; ``find`` as `missing` has it.

    Raises:
        ConfigError: it is not.
    """
    need(FOUR_BITS, "model.dtype = 'nf4'", "model.dtype = 'bfloat16'", find)


def tame_bitsandbytes() -> None:
    """Keep bitsandbytes, which PEFT imports wherever it is installed, from running code of the hub.

    On processors that compute in bfloat16 its import asks the package ``kernels``, if that is installed too, to fetch compiled
    code of a repository, and else advises to install it.
    """
    logging.getLogger(FOUR_BITS).setLevel(logging.ERROR)
    if FOUR_BITS in sys.modules or "kernels" in sys.modules or not (find_spec("kernels") and find_spec(FOUR_BITS)):
        return
    sys.modules["kernels"] = None  # type: ignore[assignment]  # Python's way to make an import fail
    try:
        import_module(FOUR_BITS)
    finally:
        del sys.modules["kernels"]
