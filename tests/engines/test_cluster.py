"""A Ray cluster of two nodes on this machine: the bytes of one node."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lalora_flwr.engines import simulation
from tests.conftest import Finished, small
from tests.engines.test_ray import ROOT, same_result
from tests.faulty_client import NOTES

RAY = [str(Path(sys.executable).parent / "ray")]
ALONE = ["--num-cpus", "1", "--node-ip-address", "127.0.0.1", "--disable-usage-stats"]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Two nodes of one processor each, as ``docs/scale.md`` starts them; the address of the first."""
    (tmp_path / "notes").mkdir()
    monkeypatch.setenv(NOTES, str(tmp_path / "notes"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the nodes, whose workers import the sites' app
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    scratch = tempfile.mkdtemp()  # Ray's sockets lie below it, and their names must be short
    head = ["--head", "--port", address.partition(":")[2], "--include-dashboard=false", "--temp-dir", scratch]
    try:
        for arguments in (head, ["--address", address]):
            subprocess.run([*RAY, "start", *arguments, *ALONE], check=True, capture_output=True, timeout=90)
        monkeypatch.setenv("RAY_ADDRESS", address)
        yield address
    finally:
        for process in _nodes(address):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(scratch, ignore_errors=True)


def _nodes(address: str) -> list[int]:
    """The processes of this cluster alone: ``ray stop`` would end every other one on the machine."""
    port, found = address.partition(":")[2], []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if ("ray" in command) and (f":{port}" in command or f"={port}" in command) and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


@pytest.mark.slow
def test_two_nodes_give_the_bytes_of_one(tmp_path: Path, cluster: str, finished: Callable[..., Finished]) -> None:
    folder = simulation.run_simulation(small(tmp_path / "out"), client_app="tests.faulty_client:spying")
    assert same_result(folder, finished().path)
    notes = [json.loads(path.read_text()) for path in (tmp_path / "notes").iterdir()]
    assert len(notes) == 6 and len({note["node"] for note in notes}) == 2  # both nodes had work
