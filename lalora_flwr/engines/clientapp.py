"""The command `flwr-clientapp` without what a ClientApp has no use for: `python clientapp.py REAL-COMMAND ARGUMENTS`.

Flower's command imports the whole of `flwr.supernode.cli`, and with it the SuperNode's databases and web server, 40 % of
the time that it takes to start: for every message that a site gets. Here the package is a name without content, and the same
function is called. Where Flower has none of this name, the real command runs.

It must not import `lalora_flwr`: a message is served by the code of the run's bundle, not by the installed package.
"""

import importlib.util
import os
import runpy
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

PACKAGE = "flwr.supernode.cli"
LOGS = Path(__file__).parents[1] / "ground" / "logs.py"
PULLING = Path(__file__).parents[1] / "wire" / "pulling.py"


def main(real: str, arguments: list[str]) -> None:
    """Be the command, with its arguments and exit code.

    Args:
        real: its path.
        arguments: what follows its name.
    """
    sys.argv = [real, *arguments]
    try:
        package = ModuleType(PACKAGE)
        found = importlib.util.find_spec("flwr.supernode")
        package.__path__ = [str(Path(place) / "cli") for place in (found and found.submodule_search_locations) or []]
        sys.modules[PACKAGE] = package
        from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    except ImportError:
        os.execv(real, [real, *arguments])
    runpy.run_path(str(PULLING))["pull_soon"]()
    with suppress(ValueError):  # the SuperNode, which checks it, would not have started
        runpy.run_path(str(LOGS))["json_logs"]()
    flwr_clientapp()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
