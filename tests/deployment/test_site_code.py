"""Approval of code by its digest, and how a site starts that holds to it."""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from typer.testing import CliRunner

from lalora_flwr.cli.main import app
from lalora_flwr.client_app import app as client_app
from lalora_flwr.engines.supernode import approved_digests, parse_arguments
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.site.bundle import ENFORCED, digests, parse, read_bundle
from tests.deployment.bundles import PROJECT, bundle
from tests.deployment.federation import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")


@pytest.fixture(autouse=True)
def _stamps() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1  # Flower stamps messages with them


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
            copy.writestr(name, archive.read(name) + (b"\n" if name == "lalora_flwr/site/round.py" else b""))
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
    assert states["lalora_flwr/site/round.py"][1] == "DIFFERS" and states["torch.py"][1] == "not installed"
    assert states["lalora_flwr/training/local.py"][1] == "as installed"
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
