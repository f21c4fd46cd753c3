"""``lalora site approve`` and ``lalora site start``: which code a site runs, and the SuperNode that holds to it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lalora_flwr import __version__
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.site.bundle import APPROVED_CODE, digest, read_bundle

INSTALLED = Path(__file__).parents[2]  # the folder that holds the installed package


def approve(
    bundle: Annotated[Path, typer.Argument(help="A .fab file that `flwr build` made, or an app's folder.", show_default=False)],
) -> None:
    """Show an app bundle's digest and every file in it, beside the installed lalora-flwr, and the line that approves it.

    Nothing of the bundle is run or unpacked. Approve what you have read, or what equals the release that you installed.
    """
    read = read_bundle(bundle)
    files = read.files()
    states = {name: _against_installed(name, content) for name, content in files.items()}
    for name, content in sorted(files.items()):
        print(f"{digest(content)}  {states[name]:<13}  {name}")
    counts = ", ".join(f"{list(states.values()).count(state)} {state}" for state in dict.fromkeys(states.values()))
    print(f"{len(files)} files ({counts}; lalora-flwr {__version__} is installed); a site runs {read.client_app} of {read.app}")
    print(f"digest {read.digest}")
    print(f'to approve it, add to the node-config, with commas between several: {APPROVED_CODE}="{read.digest}"')


def _against_installed(name: str, content: bytes) -> str:
    own = INSTALLED / name
    if not name.startswith("lalora_flwr/") or not own.is_file():
        return "not installed"
    return "as installed" if own.read_bytes() == content else "DIFFERS"


def start(
    arguments: Annotated[list[str], typer.Argument(metavar="-- ARGUMENTS", help="Those of flower-supernode.")],
) -> None:
    """Check the site, then become its SuperNode: `lalora site start -- --superlink … --node-config '…'`.

    Does not start on a fault (exit code 2). With approved-code in the node-config, no other app bundle runs.
    """
    from lalora_flwr.cli.early import check_log
    from lalora_flwr.cli.site import check_node_config, parse_node_config
    from lalora_flwr.engines.supernode import approved_digests, parse_arguments
    from lalora_flwr.site.monitoring import refreshed

    check_log()
    flags = parse_arguments(arguments)
    approved = approved_digests(flags)
    key, authority = flags.auth_supernode_private_key, flags.root_certificates
    findings = check_node_config(flags.node_config or "", Path(key) if key else None, Path(authority) if authority else None)
    for finding in findings:
        print(f"{finding.state:8}{finding.text}", file=sys.stderr)
    if any(finding.fault for finding in findings):
        raise ConfigError("the site does not start before its faults are mended")
    if not approved:
        print(
            f"lalora: warning: no {APPROVED_CODE} in the node-config: this site runs whatever code the operator sends",
            file=sys.stderr,
        )
    refreshed(parse_node_config(flags.node_config))
    sys.stderr.flush()
    # A fresh interpreter in the same process: nothing that the check loaded stays, and signals and exit codes are Flower's.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "lalora_flwr.engines.supernode", *arguments])
