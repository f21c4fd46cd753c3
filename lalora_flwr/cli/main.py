"""Entry point of the ``lalora`` command: every error that a user can mend is one line and a non-zero exit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from lalora_flwr import __version__
from lalora_flwr.cli.align import align
from lalora_flwr.cli.audit import audit
from lalora_flwr.cli.certs import certs
from lalora_flwr.cli.compare import compare
from lalora_flwr.cli.diagnose import diagnose
from lalora_flwr.cli.keys import keys
from lalora_flwr.cli.ledger import app as ledger
from lalora_flwr.cli.plan import plan
from lalora_flwr.cli.report import report
from lalora_flwr.cli.run import run
from lalora_flwr.cli.site import app as site
from lalora_flwr.cli.site_code import approve, start
from lalora_flwr.cli.site_keys import keys as sharing_keys
from lalora_flwr.cli.spelling import spell_out
from lalora_flwr.cli.verify import verify
from lalora_flwr.ground.errors import ConfigError, Interrupted, LaloraError

app = typer.Typer(
    help="Federated LoRA fine-tuning under record-level differential privacy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lalora {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Federated LoRA fine-tuning under record-level differential privacy."""


app.command()(run)
app.command()(plan)
app.command()(align)
app.command()(compare)
app.command()(report)
app.command()(diagnose)
app.command()(audit)
app.command()(verify)
app.command()(keys)
app.add_typer(ledger, name="ledger")
app.command()(certs)
site.command()(approve)
site.command()(start)
site.command("keys")(sharing_keys)
app.add_typer(site, name="site")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default this process's own. Exit 2: something to mend in the settings; 1: the run failed;
    130: interrupted."""
    for stream in (sys.stdout, sys.stderr):
        spell_out(stream)
    try:
        app(arguments, prog_name="lalora")
    except LaloraError as error:
        print("lalora:", " ".join(str(error).split()), file=sys.stderr)  # one line, whatever a library said
        sys.exit(2 if isinstance(error, ConfigError) else 130 if isinstance(error, Interrupted) else 1)
