"""Approval of code without a federation: digests, Flower's own functions fed with bundles, and processes that end together."""

from __future__ import annotations

import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.start_client_internal import _pull_and_store_message, _verify_fab
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lalora_flwr.cli.main import app
from lalora_flwr.client_app import app as client_app
from lalora_flwr.engines import with_parent
from lalora_flwr.engines.supernode import Approval, approved_digests, parse_arguments
from lalora_flwr.ground.errors import ConfigError, LaloraError
from lalora_flwr.site.bundle import ENFORCED, Bundle, digests, parse, read_bundle
from tests.deployment.federation import ROOT, wait_for

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
PROJECT = """[project]
name = "little"
version = "1.2.3"
dependencies = ["flwr>=1.41"]
license = { file = "LICENSE" }
[tool.flwr.app]
publisher = "lalora"
fab-format-version = 1
flwr-version-target = "1.41.0"
[tool.flwr.app.components]
serverapp = "little.server:app"
clientapp = "little.client:app"
"""


@pytest.fixture(autouse=True)
def _stamps() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1  # Flower stamps messages with them


@cache
def bundle(code: str = "app = 1\n") -> Bundle:
    files = {"pyproject.toml": PROJECT, "little/client.py": code, "little/server.py": "app = 1\n", "LICENSE": "free"}
    return parse(build_fab_from_files({name: text.encode() for name, text in files.items()})[0])


def run_of(made: Bundle, **changed: Any) -> Run:
    run = Run.create_empty(7)
    run.fab_id, run.fab_version, run.fab_hash, run.series_id = made.app, made.version, made.digest, 3
    for name, value in changed.items():
        setattr(run, name, value)
    return run


def fab_of(made: Bundle) -> Fab:
    return Fab(made.digest, made.content, {})


def approval(home: Path, *approved: Bundle) -> Approval:
    folder = {(made.app, made.version, made.digest): home / made.digest[:8] for made in approved}
    return Approval(frozenset(made.digest for made in approved), lambda *named: folder[named])


def trusted(fab: Fab, by: Approval) -> bool:
    """Flower's own word on a bundle."""
    return bool(fab.verifications["valid_license"]) and _verify_fab(fab, by.trusted_entities())


# what a bundle is


def test_the_digest_of_a_folder_is_that_of_the_bundle_that_flower_builds(tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("flwr"), "build", "--app", str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "FLWR_HOME": str(tmp_path)}, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp_path.glob("*.fab")
    assert read_bundle(built).digest == read_bundle(ROOT).digest == hashlib.sha256(built.read_bytes()).hexdigest()


def test_approve_shows_the_digest_every_file_and_what_differs_from_the_installed_package(tmp_path: Path) -> None:
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(read_bundle(ROOT).content)) as archive, zipfile.ZipFile(changed, "w") as copy:
        for name in archive.namelist():
            copy.writestr(name, archive.read(name) + (b"\n" if name == "lalora_flwr/site.py" else b""))
        copy.writestr("torch.py", "open('ran', 'w')")
    file = tmp_path / "changed.fab"
    file.write_bytes(changed.getvalue())
    shown = CliRunner().invoke(app, ["site", "approve", str(file)])
    assert shown.exit_code == 0, shown.output
    states = {words[-1]: (words[0], " ".join(words[1:-1])) for words in map(str.split, shown.output.splitlines()[:-3])}
    files = parse(changed.getvalue()).files()
    assert {name: found for name, (found, _) in states.items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in files.items()
    }
    assert states["lalora_flwr/site.py"][1] == "DIFFERS" and states["torch.py"][1] == "not installed"
    assert states["lalora_flwr/training.py"][1] == "as installed"
    found = hashlib.sha256(changed.getvalue()).hexdigest()
    assert f'approved-code="{found}"' in shown.output and "lalora_flwr.client_app:app" in shown.output


def test_no_bundle_is_approved_that_flower_cannot_run_or_that_hides_a_file(tmp_path: Path) -> None:
    twice = io.BytesIO(bundle().content)
    with zipfile.ZipFile(twice, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("little/client.py", "app = 2\n")
    agent = PROJECT.replace('clientapp = "little.client:app"\n', "")
    for content, said in ((twice.getvalue(), "twice"), (b"no zip", "not an app bundle"), (b"", "not an app bundle")):
        (tmp_path / "made.fab").write_bytes(content)
        with pytest.raises(ConfigError, match=said):
            read_bundle(tmp_path / "made.fab")
    with zipfile.ZipFile(tmp_path / "made.fab", "w") as archive:
        archive.writestr("pyproject.toml", agent)
    for path in (tmp_path / "made.fab", tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigError):
            read_bundle(path)


def test_digests_are_64_hexadecimal_digits_with_commas_between() -> None:
    one, two = "0" * 64, "ab" * 32
    assert digests(one) == {one} and digests(f"{one}, {two}") == {one, two}
    for text in ("", ",", one[1:], one + "0", f"{one},", one.replace("0", "g"), two.upper(), 7, True, None):
        with pytest.raises(ConfigError, match="approved-code must be digests"):
            digests(text)


# what Flower does with it


def test_flower_trusts_an_approved_bundle_and_no_other(tmp_path: Path) -> None:
    good, bad = bundle(), bundle("app = 2\n")
    by = approval(tmp_path, good)
    passed = by.judged(fab_of(good), run_of(good))
    assert trusted(passed, by) and passed.content == good.content and passed.hash_str == good.digest
    assert not trusted(passed, approval(tmp_path, good))  # another process's key
    refused = by.judged(fab_of(bad), run_of(bad))
    assert not trusted(refused, by) and refused.content == b""
    stolen = Fab(bad.digest, bad.content, passed.verifications)  # the SuperLink got hold of a signature
    assert not trusted(stolen, by) and not trusted(by.judged(stolen, run_of(bad)), by)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_single_bit_makes_another_bundle(tmp_path: Path, at: int, bit: int) -> None:
    good = bundle()
    by = approval(tmp_path, good)
    content = bytearray(good.content)
    content[at % len(content)] ^= 1 << bit
    refused = by.judged(Fab(good.digest, bytes(content), {}), run_of(good))
    assert refused.content == b"" and not trusted(refused, by)


@pytest.mark.parametrize(
    "lie",
    [
        {"fab_hash": "0" * 64},
        {"fab_id": "lalora/other"},
        {"fab_version": "../../1.2.3"},
        {"primary_task_type": "flwr-agentapp"},
        {"primary_task_type": "flwr-connector"},
    ],
    ids=str,
)
def test_an_approved_bundle_under_another_name_is_refused(tmp_path: Path, lie: dict[str, Any]) -> None:
    """Flower loads the folder that run's app, version and digest name, whatever bundle was unpacked."""
    good = bundle()
    by = approval(tmp_path, good)
    assert by.judged(fab_of(good), run_of(good, **lie)).content == b""
    assert by.judged(fab_of(good), None).content == b""
    assert trusted(by.judged(fab_of(good), run_of(good)), by)


def test_what_was_unpacked_before_under_the_same_name_is_removed_once(tmp_path: Path) -> None:
    good = bundle()
    by = approval(tmp_path, good)
    folder = tmp_path / good.digest[:8]
    (folder / "little").mkdir(parents=True)
    (folder / "little" / "client.py").write_text("open('ran', 'w')")
    assert by.judged(fab_of(good), run_of(good)).content == good.content
    assert not folder.exists()
    folder.mkdir()  # this process's own: a later run's
    assert by.judged(fab_of(good), run_of(good)).content == good.content
    assert folder.exists()


def test_what_cannot_be_removed_is_not_run(tmp_path: Path) -> None:
    good = bundle()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / good.digest[:8]).symlink_to(elsewhere)
    assert approval(tmp_path, good).judged(fab_of(good), run_of(good)).content == b""


class SuperLink:
    """One message of a run whose bundle is ``made``, as the functions by which a SuperNode calls the SuperLink."""

    def __init__(self, made: Bundle) -> None:
        self._made = made
        self.objects = 0  # fetched of the message

    @contextmanager
    def connect(self) -> Iterator[tuple[Any, ...]]:
        message = Message(RecordDict(), dst_node_id=5, message_type="train")
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = get_all_nested_objects(message)

        def get_run(run_id: int) -> Run:
            return run_of(self._made)

        def get_fab(fab_hash: str, run_id: int) -> Fab:
            return fab_of(self._made)

        def pull_object(run_id: int, object_id: str) -> bytes:
            self.objects += 1
            return objects[object_id].deflate()

        def unused(*_: Any) -> None: ...

        yield (5, lambda: (message, get_object_tree(message)), unused, get_run, get_fab, pull_object, unused, unused)


def pulled(superlink: SuperLink, by: Approval) -> Any:
    """Flower's state after its own loop's body has run once."""
    stores = ObjectStoreFactory()
    state = NodeStateFactory(objectstore_factory=stores).state()
    state.set_node_id(5)
    with by.guard(superlink.connect)() as functions:
        names = ("receive", "", "get_run", "get_fab", "pull_object", "", "confirm_message_received")
        calls = {name: function for name, function in zip(names, functions[1:], strict=True) if name}
        number = _pull_and_store_message(
            state=state, object_store=stores.store(), node_config={}, trusted_entities=by.trusted_entities(), **calls
        )
    assert number == 7
    return state


def test_flowers_loop_answers_with_an_error_and_makes_no_task_of_a_bundle_that_is_not_approved(tmp_path: Path) -> None:
    superlink = SuperLink(bundle("app = 2\n"))
    state = pulled(superlink, approval(tmp_path, bundle()))
    (reply,) = state.get_messages_legacy(is_reply=True)
    assert reply.error.reason == "The FAB could not be verified."
    assert not state.get_tasks() and not state.fab_store and state.get_run(7) is None and not superlink.objects


def test_flowers_loop_makes_a_task_of_an_approved_bundle(tmp_path: Path) -> None:
    superlink = SuperLink(bundle())
    state = pulled(superlink, approval(tmp_path, bundle()))
    assert list(state.fab_store) == [bundle().digest] and state.get_run(7) is not None and superlink.objects
    assert [task.fab_hash for task in state.get_tasks()] == [bundle().digest]
    assert not state.get_messages_legacy(is_reply=True)


def test_a_flower_that_fetches_bundles_by_another_way_does_not_start(tmp_path: Path) -> None:
    @contextmanager
    def connect() -> Iterator[tuple[Any, ...]]:
        yield 5, len, len, len, len

    with pytest.raises(LaloraError, match="this version of Flower"), approval(tmp_path, bundle()).guard(connect)():
        pass


# how a site starts


def test_no_other_flag_lets_in_code_beside_the_approved() -> None:
    config = ["--node-config", f'a=1 approved-code="{"0" * 64}"']
    assert approved_digests(parse_arguments(config)) == {"0" * 64}
    assert approved_digests(parse_arguments(["--node-config", "a=1"])) == approved_digests(parse_arguments([])) == frozenset()
    flags = ["--trusted-entities keys.yaml", "--allow-runtime-dependency-installation", "--isolation process", "--host 0.0.0.0"]
    for flag in map(str.split, flags):
        with pytest.raises(ConfigError, match=f"{' '.join(flag[:1])}.* and approved-code"):
            approved_digests(parse_arguments([*config, *flag]))
    with pytest.raises(ConfigError, match="approved-code must be digests"):
        approved_digests(parse_arguments(["--node-config", 'approved-code=""']))


def test_a_site_with_a_fault_does_not_start() -> None:
    command = [Path(sys.executable).with_name("lalora"), "site", "start", "--", "--node-config", "max-epsilon=1.0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "fault " in done.stderr and "Starting Flower SuperNode" not in done.stderr
    assert re.search(r"^lalora: the site does not start", done.stderr, re.MULTILINE)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_plain_supernode_does_not_serve_where_code_was_approved(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENFORCED, raising=False)
    context = Context(1, 5, {"approved-code": "0" * 64}, RecordDict(), {})
    message = Message(RecordDict(), dst_node_id=5, message_type=kind)
    reply = client_app(message, context)
    assert reply.error.reason == "node-config: approved-code has no effect; start the site with `lalora site start`"
    monkeypatch.setenv(ENFORCED, "0" * 64)
    assert "approved-code" not in client_app(message, context).error.reason


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
        f"make_scripts(pathlib.Path({str(scripts)!r}))\n"
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
        wait_for("their end", lambda: not any(map(_lives, helpers)))
    finally:
        for helper in filter(_lives, helpers):
            helper.kill()


def _lives(process: psutil.Process) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)


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
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(FileNotFoundError, match="is not in PATH"):
        with_parent.make_scripts(tmp_path)


def test_scripts_take_the_place_of_commands_that_a_supernode_starts_by_name() -> None:
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType

    assert with_parent.PROGRAMS[1] == TASK_TYPE_TO_COMMAND[TaskType.CLIENT_APP]
