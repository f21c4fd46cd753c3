"""A site's helper processes end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lalora_flwr.engines import with_parent
from tests.deployment.processes import lives, wait_for


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_helper_processes_end_with_a_parent_that_was_killed_even_if_they_cannot_act(tmp_path: Path) -> None:
    """Stopped, they can neither look for their parent nor take a signal: only SIGKILL ends them."""
    programs, scripts = tmp_path / "programs", tmp_path / "scripts"
    programs.mkdir()
    for program, calls in (
        ("flower-superexec", "subprocess.run(['flwr-clientapp'])"),
        ("flwr-clientapp", "print(1, flush=True)"),
    ):
        text = f"#!{sys.executable} -S\nimport subprocess, time\n{calls}\ntime.sleep(600)\n"
        (programs / program).write_text(text)
        (programs / program).chmod(0o755)
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    code = (
        "import os, subprocess, sys, pathlib; from lalora_flwr.engines.with_parent import make_scripts\n"
        f"make_scripts(pathlib.Path({str(scripts)!r}), shorter={{}})\n"
        f"os.environ['PATH'] = {str(scripts)!r} + os.pathsep + os.environ['PATH']\n"
        "subprocess.run(['flower-superexec'])"
    )
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PATH": path}, stdout=subprocess.PIPE) as site:
        assert site.stdout is not None and site.stdout.readline() == b"1\n"
        helpers = psutil.Process(site.pid).children(recursive=True)
        assert len(helpers) == 2
        for helper in helpers:
            helper.suspend()
        os.kill(site.pid, signal.SIGKILL)
    try:
        wait_for("their end", lambda: not any(map(lives, helpers)))
    finally:
        for helper in filter(lives, helpers):
            helper.kill()


def test_the_scripts_find_the_real_commands_again_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]))
    with_parent.make_scripts(tmp_path)
    first = {script.name: script.read_text() for script in tmp_path.iterdir()}
    with_parent.make_scripts(tmp_path)
    assert first == {script.name: script.read_text() for script in tmp_path.iterdir()} and set(first) == set(with_parent.PROGRAMS)
    assert all(str(tmp_path) not in text.split("exec", 1)[1].split("with_parent.py", 1)[1] for text in first.values())
    monkeypatch.setenv("PATH", str(tmp_path))  # as under a supervisor
    with_parent.make_scripts(tmp_path)
    assert first == {script.name: script.read_text() for script in tmp_path.iterdir()}
    with pytest.raises(FileNotFoundError, match="is not in PATH"):
        with_parent.make_scripts(tmp_path, interpreter="/nowhere/python")


def test_scripts_take_the_place_of_commands_that_a_supernode_starts_by_name() -> None:
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType

    assert with_parent.PROGRAMS[1] == TASK_TYPE_TO_COMMAND[TaskType.CLIENT_APP]


def test_the_shorter_command_is_flowers_own_without_the_supernode_and_without_this_package() -> None:
    real = Path(sys.executable).parent / "flwr-clientapp"
    shorter = [sys.executable, "-P", str(with_parent.SHORTER["flwr-clientapp"]), str(real)]
    for arguments, code in (["--help"], 0), (["--nonsense"], 2):
        own, flowers = (subprocess.run([*c, *arguments], capture_output=True, text=True) for c in (shorter, [str(real)]))
        assert (own.returncode, own.stdout, own.stderr) == (code, flowers.stdout, flowers.stderr)
    code_run = (
        f"import runpy, sys; sys.argv = {[shorter[2], str(real), '--help']!r}\n"
        f"try: runpy.run_path({shorter[2]!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'flwr', 'lalora_flwr', 'sqlalchemy', 'alembic'}))"
    )
    said = subprocess.run([sys.executable, "-P", "-c", code_run], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "['flwr']"


def test_without_flowers_command_under_this_name_the_real_one_runs(tmp_path: Path) -> None:
    real = tmp_path / "flwr-clientapp"
    real.write_text('#!/bin/sh\necho "real $@"\n')
    real.chmod(0o755)
    (tmp_path / "flwr").mkdir()
    (tmp_path / "flwr" / "__init__.py").write_text("")
    command = [sys.executable, "-P", str(with_parent.SHORTER["flwr-clientapp"]), str(real), "--token", "x"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert said.stdout == "real --token x\n"
