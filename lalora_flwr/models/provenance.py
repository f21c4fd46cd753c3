"""Which base model this is: revision, file digests, and one digest over all frozen weights that sites compare."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from lalora_flwr.ground.files import file_digest


@dataclass(frozen=True)
class Provenance:
    """Attributes:
    revision: commit of the hub repository; empty for a local folder or random weights.
    files: SHA-256 of each file that was read, by name.
    digest: SHA-256 over names, shapes, types and bytes of all weights as loaded, before any cast, and over what else
        decides what the model computes: configuration, tokenizer, preparation of images.
    """

    revision: str = ""
    files: dict[str, str] = field(default_factory=dict)
    digest: str = ""


def provenance(module: nn.Module, files: list[Path], revision: str = "", about: str = "") -> Provenance:
    """Provenance of a model that was just loaded from files; ``about`` says what its weights do not."""
    digest = weights_digest(module)
    if about:
        digest = hashlib.sha256(f"{digest}{about}".encode()).hexdigest()
    return Provenance(revision, {file.name: file_digest(file) for file in sorted(files)}, digest)


def weights_digest(module: nn.Module) -> str:
    """Equal for two models only if their weights and buffers are identical."""
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def commit_of(file: Path) -> str:
    """The commit under which the hub's cache keeps a file (…/snapshots/<commit>/file); empty elsewhere."""
    folder = file.parent
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name) else ""
