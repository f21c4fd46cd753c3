"""``lalora site``: what the owner of a site does before and when it joins a federation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="A site: check it before it joins, approve code, start its SuperNode.", no_args_is_help=True)


@dataclass(frozen=True)
class Finding:
    """One line of a check."""

    text: str
    fault: bool


@app.callback()
def _group() -> None:
    """Keeps `lalora site` a group of commands."""


@app.command("check")
def check(node_config: Annotated[str, typer.Argument(help="The text that follows --node-config.", show_default=False)]) -> None:
    """Make all checks of a site. Exit 1: a fault."""
    findings = check_node_config(node_config)
    for finding in findings:
        typer.echo(f"{'fault' if finding.fault else 'ok'}: {finding.text}")
    if any(finding.fault for finding in findings):
        raise typer.Exit(1)


def check_node_config(text: str, superlink_key: Path | None = None, root_certificates: Path | None = None) -> list[Finding]:
    """All of a site's checks before it joins."""
    from flwr.common.config import parse_config_args

    from lalora_flwr.errors import LaloraError
    from lalora_flwr.privacy.caps import caps_from

    try:
        caps_from(parse_config_args([text]), needed=True)
    except LaloraError as error:
        return [Finding(str(error), fault=True)]
    return [Finding("node-config: all keys are known", fault=False)]
