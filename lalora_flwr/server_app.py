"""The ServerApp: settings in, a run folder out."""

from __future__ import annotations

import logging

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run-config describes."""
    from flwr.supercore.exit import add_exit_handler

    from lalora_flwr.ground.logs import json_logs
    from lalora_flwr.ground.owner import end_with_owner
    from lalora_flwr.server.run import run_federation
    from lalora_flwr.settings import settings_from

    json_logs()
    log = logging.getLogger("lalora_flwr.server")
    log.handlers = logging.getLogger("flwr").handlers  # so that the run's log, which Flower keeps, holds these lines too
    log.setLevel(logging.INFO)
    end_with_owner()
    log.info("results are in %s", run_federation(settings_from(context.run_config), grid, at_exit=add_exit_handler))
