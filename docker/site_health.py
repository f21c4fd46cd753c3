"""Whether a site's container is up: exit code 0, or 1 and one line.

    python site_health.py LEDGER [PORT]

The SuperNode has to answer on the port that it serves to its own ClientApps (9094), and the ledger to be readable, with every
hash right. It does not say whether the SuperLink can be reached, or whether budget is left.
"""

from __future__ import annotations

import sys
import urllib.request

from lalora_flwr.ground.errors import LedgerError
from lalora_flwr.ledger.file import LedgerFile

PORT = 9094
PATIENCE = 10.0  # seconds for each of the two


def fault(ledger: str, port: int = PORT) -> str:
    """What is wrong; empty if nothing is."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=PATIENCE):
            pass
    except OSError as error:
        return f"the SuperNode does not answer on port {port}: {error}"
    try:
        LedgerFile(ledger, PATIENCE).read()
    except LedgerError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    sys.exit(fault(sys.argv[1], *map(int, sys.argv[2:])) or 0)
