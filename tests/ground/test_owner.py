"""A simulation ends with the process that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lalora_flwr.ground.owner import OWNER, end_with_owner

OWNED = "from lalora_flwr.ground import owner; owner.GRACE = 1.0; owner.end_with_owner(); print('on', flush=True); import time"
WAITS = "time.sleep(60)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


@pytest.mark.parametrize(("does", "end"), [(WAITS, signal.SIGTERM), (DEAF, signal.SIGKILL)], ids=["waits", "deaf"])
def test_the_owned_process_ends_after_its_owner_was_killed(does: str, end: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as owner:
        script = f"{OWNED}; {does}"
        environment = {**os.environ, OWNER: str(owner.pid)}
        with subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE) as owned:
            try:
                assert owned.stdout is not None and owned.stdout.readline() == b"on\n"
                time.sleep(1.0)
                assert owned.poll() is None
                owner.kill()
                owner.wait()
                assert owned.wait(30) == -end
            finally:
                owner.kill()
                owned.kill()


def test_a_simulation_that_nobody_owns_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OWNER, raising=False)
    end_with_owner()
    assert not any(thread.name == "owner" for thread in threading.enumerate())
