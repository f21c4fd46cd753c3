"""The installed Flower has the waits that are shortened."""

import subprocess
import sys

from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, pull_objects

from lalora_flwr.wire.pulling import FIRST, WAIT

CODE = (
    "from lalora_flwr.wire.pulling import pull_soon; pull_soon()\n"
    "from flwr.superlink.grid import http_grid; from flwr.supernode import start_client_internal as node\n"
    "from flwr.supernode.runtime import run_clientapp as app\n"
    "found = http_grid.pull_objects, node.pull_objects, app.pull_and_inflate_object_from_tree\n"
    f"print([function.__kwdefaults__[{WAIT!r}] for function in found])"
)


def test_all_who_pull_in_a_process_wait_less_before_they_look_again() -> None:
    assert all(function.__kwdefaults__[WAIT] >= 10 * FIRST for function in (pull_objects, pull_and_inflate_object_from_tree))
    said = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    assert said.strip() == str([FIRST] * 3)
