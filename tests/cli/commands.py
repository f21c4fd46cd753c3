"""The command line in this process and in one of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lalora_flwr.cli import main as cli
from tests.conftest import SMALL

LALORA = Path(sys.executable).with_name("lalora")


Outcome = tuple[int, str, str]


Lalora = Callable[..., Outcome]


NO_NOISE = {"num_rounds": 1, "privacy__epsilon": "inf"}  # a run for whose noise no accountant has to work


def pairs(**overrides: Any) -> str:
    """The small run as one ``-c`` argument."""
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in overrides.items()}
    values = {**SMALL, "num-supernodes": 2, **named}
    return " ".join(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items())


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Warnings go where they go without pytest, which keeps them to itself."""

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))

    with warnings.catch_warnings():
        warnings.resetwarnings()
        for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", hidden)
        warnings.showwarning = show
        yield


def real_lalora(folder: Path, *arguments: str) -> Outcome:
    """The installed command in a process of its own."""
    env = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([LALORA, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout, without_waiting(done.stderr)


def without_waiting(err: str) -> str:
    """What was said on stderr besides that it takes a while, as it does on a busy machine."""
    return "".join(line for line in err.splitlines(keepends=True) if not re.fullmatch(r"[^:]+: \d+ s so far\n?", line))


def assert_one_line(outcome: Outcome, *parts: str, code: int = 2) -> None:
    left, _, err = outcome
    assert left == code, err
    assert err.startswith("lalora: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert part in err


@pytest.fixture
def lalora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Lalora:
    """The command in this process, in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> Outcome:
        with warnings_on_stderr(), pytest.raises(SystemExit) as left:
            cli.main(arguments)
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, without_waiting(err)

    return call
