"""``lalora site keys``: the key pair with which a site takes part in secure sums."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.wire.sharing import NAME, NAMES, Member, public_bytes, written_key


def keys(
    name: Annotated[str, typer.Argument(help="The site's name in the rosters.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the private key; made if it is missing.")] = Path(),
) -> None:
    """Make the key with which a site takes part in secure sums, and print its line for the rosters of all owners.

    The private key stays on the site. Owners exchange the lines by a way that they trust, not over the federation's server:
    whoever swaps a line can read what is masked for it. Never overwrites a file.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r}: a site's name is {NAMES}")
    file = out / f"{name}.sharing.key"
    key = X25519PrivateKey.generate()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
            opened.write(written_key(key))
    except FileExistsError:
        raise ConfigError(f"{file}: is there already; a key is never overwritten, since the rosters of others hold it") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror}") from None
    typer.echo(Member(name, public_bytes(key)).line)
    typer.echo(
        f"the private key is {file}; put the line above into the roster file of every owner, and name both in the", err=True
    )
    typer.echo(f'site\'s node-config: sharing-key="{file.absolute()}" sharing-roster="…"', err=True)
