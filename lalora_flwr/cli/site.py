"""``lalora site``: what the owner of a site does before and when it joins a federation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.settings.keys import Value

app = typer.Typer(help="A site: check it before it joins, approve code, start its SuperNode.", no_args_is_help=True)
OK, WARNING, FAULT = "ok", "warning", "fault"
PAIR = re.compile(r"(\S+?)=(\'[^\']*\'|\"[^\"]*\"|\S+)")  # what Flower's parser finds; it passes over everything else


@dataclass(frozen=True)
class Finding:
    """One line of a check: `OK`, `WARNING` or `FAULT`, what it is about, and what was found."""

    state: str
    subject: str
    detail: str

    @property
    def fault(self) -> bool:
        return self.state == FAULT

    @property
    def text(self) -> str:
        return f"{self.subject}: {' '.join(self.detail.split())}"


@app.callback()
def _group() -> None:
    """Keeps `lalora site` a group of commands."""


@app.command("check")
def check(
    node_config: Annotated[str, typer.Argument(help="The text that follows --node-config.", show_default=False)],
    superlink_key: Annotated[Path | None, typer.Option(help="The site's private key for the SuperLink.")] = None,
    root_certificates: Annotated[Path | None, typer.Option(help="The authority's certificate, ca.crt.")] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Also attack the installed code, at the site's budget and number of records.")
    ] = False,
) -> None:
    """Make all checks of a site; nothing is counted in its ledger. Exit 1: a fault; 2: the text cannot be parsed."""
    findings = check_node_config(node_config, superlink_key, root_certificates)
    if audit and not any(finding.subject == "keys" and finding.fault for finding in findings):
        from lalora_flwr.cli.site_audit import audited

        findings.append(audited(parse_node_config(node_config)))
    for finding in findings:
        typer.echo(f"{finding.state:8}{finding.text}")
    if any(finding.fault for finding in findings):
        raise typer.Exit(1)


def check_node_config(text: str, superlink_key: Path | None = None, root_certificates: Path | None = None) -> list[Finding]:
    """All of a site's checks before it joins.

    Raises:
        ConfigError: the text cannot be parsed.
    """
    parsed = parse_node_config(text)
    from lalora_flwr.cli.site_checks import checks  # heavy imports only when there is something to check

    return list(checks(parsed, superlink_key, root_certificates))


def parse_node_config(text: str) -> dict[str, Value]:
    """A node-config as ``flower-supernode`` parses it.

    Raises:
        ConfigError: it cannot be parsed, or Flower would pass over a part of it without a word.
    """
    import click
    from flwr.common.config import parse_config_args

    if not text.endswith(".toml") and (rest := PAIR.sub(" ", text).split()):
        raise ConfigError(f"node-config: Flower would pass over {rest[0]!r}; write key=value, without blanks around the =")
    try:
        parsed = parse_config_args([text])
    except click.ClickException as error:
        raise ConfigError(f"node-config: cannot be parsed: {error.message}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"node-config: cannot be read: {error}") from None
    if not parsed:
        raise ConfigError("node-config: is empty")
    return parsed
