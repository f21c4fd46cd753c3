"""``lalora site keys``: the key pair with which a site takes part in secure sums."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from lalora_flwr.cli.certs import write_new
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.wire.profile import NAME, NAMES
from lalora_flwr.wire.sharing import Member, public_bytes, written_key


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
    file, key = f"{name}.sharing.key", X25519PrivateKey.generate()
    (made,) = write_new(out, {file: written_key(key)}, secret={file})
    typer.echo(Member(name, public_bytes(key)).line)
    typer.echo(
        f"the private key is {made}; put the line above into the roster file of every owner, and name both in the", err=True
    )
    typer.echo(f'site\'s node-config: sharing-key="{made.absolute()}" sharing-roster="…"', err=True)
