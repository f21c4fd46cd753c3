"""What a message has to be served in: code, node-config, environment, packages, model files, and the SuperNode that is served.

A fresh process takes all of it as it is now. A trainer that was started in other surroundings might do something else, and is
never given the message.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lalora_flwr.ground.cache import Stamp, stamp, stamp_below

ROOT = Path(__file__).parents[3]  # the folder that holds this package: of the unpacked bundle, or of the installation
NodeConfig = Mapping[str, bool | int | float | str]


@dataclass(frozen=True)
class Owner:
    """The process whose end is a trainer's end. ``started``: tells it from another with its number."""

    process: int
    started: str

    @staticmethod
    def of(process: int) -> Owner:
        try:
            started = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
        except (OSError, IndexError):
            started = ""
        return Owner(process, started)


def surroundings(
    node_config: NodeConfig,
    model: str,
    owner: Owner,
    bundles: Path,
    *,
    root: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    path: Sequence[str] | None = None,
) -> bytes:
    """A digest of all that decides what code does with a message, but for the message and the owner's data and ledger.

    Args:
        node_config: the site's.
        model: the folder that the base model is read from, if it is one on this machine.
        owner: of the trainer.
        bundles: where Flower unpacks app bundles.
        root: the folder that holds the code.
        environment, path: of a process; default: this one's.
    """
    told = {
        "node-config": dict(node_config),
        "code": code_digest(root, bundles),
        "environment": dict(os.environ if environment is None else environment),
        "path": (path := list(sys.path if path is None else path)),
        "packages": stamp(*(Path(folder) for folder in path if folder.endswith("-packages"))),
        "python": [sys.executable, sys.version],
        "folder": os.getcwd(),
        "user": os.geteuid(),
        "model": model_stamp(node_config, model),
        "owner": [owner.process, owner.started],
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).digest()


def code_digest(root: Path, bundles: Path) -> str:
    """SHA-256 over the names and contents of this package's modules, and of all files of the bundle, if it lies in one."""
    sha = hashlib.sha256(str(root).encode())
    for file in _code(root, bundles):
        content = file.read_bytes()
        sha.update(f"{file.relative_to(root)}\0{len(content)}\0".encode() + content)
    return sha.hexdigest()


def _code(root: Path, bundles: Path) -> Iterator[Path]:
    found = root.rglob("*") if root.is_relative_to(bundles) else (root / "lalora_flwr").rglob("*.py")
    yield from sorted(file for file in found if file.is_file() and "__pycache__" not in file.parts)


def model_stamp(node_config: NodeConfig, model: str) -> Stamp:
    """Of the owner's own copy of the model all files. Of a folder that a run names only those directly in it, and only if it is
    a model's: a run may name any folder of the machine."""
    if own := str(node_config.get("model-path", "")):
        return stamp_below(own)
    folder = Path(model)
    try:
        return stamp(*sorted(folder.iterdir())) if model and (folder / "config.json").is_file() else ()
    except (OSError, ValueError):
        return ()
