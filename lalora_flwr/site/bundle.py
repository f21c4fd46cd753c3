"""An app bundle (FAB): the zip file of an app's code that `flwr run` sends to every site, and its digest."""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lalora_flwr.ground.errors import ConfigError, SiteRefusal

APPROVED_CODE = "approved-code"  # node-config key: the digests that a site is willing to run
ENFORCED = "LALORA_APPROVED_CODE"  # in the environment of the ClientApps of a SuperNode that holds to it
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Bundle:
    """A bundle that Flower accepts."""

    content: bytes
    app: str  # publisher/name
    version: str
    client_app: str  # module:attribute that runs on a site

    @property
    def digest(self) -> str:
        return digest(self.content)

    def files(self) -> dict[str, bytes]:
        """Every file that the bundle brings to a site, by its path."""
        with zipfile.ZipFile(io.BytesIO(self.content)) as archive:
            return {name: archive.read(name) for name in archive.namelist()}


def digest(content: bytes) -> str:
    """SHA-256 of the whole file in hexadecimal, as Flower's own `fab-hash`."""
    return hashlib.sha256(content).hexdigest()


def read_bundle(path: Path) -> Bundle:
    """A bundle from a ``.fab`` file, or built in memory from an app's folder as `flwr run` and `flwr build` build it.

    Raises:
        ConfigError: if Flower would not accept it, or if it holds two files of one name.
    """
    import click
    from flwr.cli.build import build_fab_from_disk

    if path.is_file():
        return parse(path.read_bytes(), str(path))
    if not path.is_dir():
        raise ConfigError(f"{path}: there is no such file or folder")
    try:
        return parse(build_fab_from_disk(path), str(path))
    except (ValueError, OSError, click.ClickException) as error:
        raise ConfigError(f"{path}: Flower cannot build a bundle from this folder: {error}") from None


def parse(content: bytes, name: str = "bundle") -> Bundle:
    """Look into a bundle without running or unpacking any of it.

    Raises:
        ConfigError: as in `read_bundle`; ``name`` is what the text calls the bundle.
    """
    from flwr.common.config import get_fab_config, get_metadata_from_config

    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            counts = Counter(archive.namelist())
        config = get_fab_config(content)
        app, version = get_metadata_from_config(config)
        client_app = config["tool"]["flwr"]["app"]["components"]["clientapp"]
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{name}: not an app bundle that Flower can run on a site: {error}") from None
    if twice := sorted(file for file, count in counts.items() if count > 1):
        raise ConfigError(f"{name}: holds {twice[0]!r} twice, so that it is not clear which one runs; do not approve it")
    return Bundle(content, app, version, client_app)


def digests(text: object) -> frozenset[str]:
    """The digests of a node-config's `approved-code`: one, or several with commas between them.

    Raises:
        ConfigError: if one of them is not a digest, or the list is empty.
    """
    found = frozenset(part.strip() for part in text.split(",")) if isinstance(text, str) else frozenset()
    if not found or not all(_DIGEST.fullmatch(part) for part in found):
        raise ConfigError(
            f"node-config: {APPROVED_CODE} must be digests of 64 hexadecimal digits, with commas between them; "
            "`lalora site approve BUNDLE` prints the line"
        )
    return found


def check_enforced(node_config: Mapping[str, object]) -> None:
    """Refuse to work for an owner who approved code, where nothing looks at the code: under a plain `flower-supernode`.

    This is for the owner who forgot, and no protection: code that was not approved would not call it.

    Raises:
        SiteRefusal: with a fixed reason.
    """
    if APPROVED_CODE in node_config and not os.environ.get(ENFORCED):
        raise SiteRefusal("node-config: approved-code has no effect; start the site with `lalora site start`")
