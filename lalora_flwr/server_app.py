"""The ServerApp: settings in, a run folder out."""

from __future__ import annotations

import logging

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run-config describes."""
    from lalora_flwr.config import settings_from
    from lalora_flwr.federation import run_federation

    folder = run_federation(settings_from(context.run_config), grid)
    logging.getLogger("lalora_flwr.server").info("results are in %s", folder)
