"""A real SuperLink and real SuperNodes on loopback, with TLS and node authentication."""

from __future__ import annotations

import datetime
import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from typer.testing import CliRunner

from lalora_flwr.cli.certs import ALWAYS, _general_name, _read_authority, make_certificate, superlink_files
from lalora_flwr.cli.main import app
from lalora_flwr.ledger.file import LedgerFile
from tests.deployment.federation import ROOT, Federation
from tests.deployment.processes import LOOPBACK, free_port
from tests.deployment.texts import save_texts, text_run

pytestmark = pytest.mark.slow


def test_two_sites_train_on_their_own_files(tmp_path: Path) -> None:
    north, south = save_texts(tmp_path / "north.csv", 60, seed=1), save_texts(tmp_path / "south.parquet", 70, seed=2)
    with Federation(tmp_path) as federation:
        federation.start_superlink()
        federation.add_sites({"north": north, "south": south}, {"device": "cpu"})
        run = federation.submit(text_run(tmp_path))
        status = federation.wait(run)
        assert status == "finished:completed", federation.logs(run)
        folder = tmp_path / "runs" / "run"
        assert (folder / "summary.json").exists(), federation.logs(run)
        for site in ("north", "south"):
            assert CliRunner().invoke(app, ["ledger", "verify", str(federation.ledger(site))]).exit_code == 0
            spent = LedgerFile(federation.ledger(site)).read().book
            assert sum(steps for _, _, steps in spent.segments("default")) == 4
        ledgers = [str(federation.ledger(site)) for site in ("north", "south")]
        verified = CliRunner().invoke(app, ["verify", str(folder), *ledgers])
        assert verified.exit_code == 0 and verified.stdout.count("of this run it counts 4 steps") == 2, verified.output
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seeded"] is False and summary["private"] is True
    assert summary["rounds"] == 2 and summary["failures"] == 0 and summary["data"] == "sites"
    assert 0 < summary["epsilon"] <= 4.0 and len(summary["sites"]) == 2
    assert all(site["steps"] == 4 and site["seeded"] is False for site in summary["sites"].values())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["round"], line["sites"]) for line in lines] == [(1, 2), (2, 2)]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert (folder / "adapter" / "adapter_model.safetensors").exists()


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A SuperLink that many refused nodes call; it stays up all the while."""
    with Federation(tmp_path_factory.mktemp("federation")) as federation:
        federation.start_superlink()
        yield federation
        assert federation.healthy()


def refused(federation: Federation, name: str, *command: str) -> str:
    """Start a SuperNode that must not get in; what it said when it gave up."""
    node = federation.start(name, *command)
    assert node.exit_code() == 1
    assert "SuperNode ID:" not in node.said() and federation.online() == 0
    return node.said()


def test_a_registered_site_is_accepted_and_a_killed_one_leaves_no_process(superlink: Federation) -> None:
    """The control of the refusals below."""
    superlink.register("known")
    node = superlink.start("known", *superlink.supernode_command("known"))
    superlink._wait_connected("known")
    assert superlink.online() == 1
    helpers = node.descendants()
    assert helpers
    node.terminate()
    psutil.wait_procs(helpers, timeout=10)
    assert not any(helper.is_running() for helper in helpers) and superlink.online() == 0


def test_a_site_that_is_not_registered_is_refused(superlink: Federation) -> None:
    said = refused(superlink, "stranger", *superlink.supernode_command("stranger"))
    assert "Exit Code: 305" in said and "[code: 2004] Failed to activate SuperNode" in said, said


def test_a_site_without_a_key_is_refused(superlink: Federation) -> None:
    command = superlink.supernode_command("keyless")
    at = command.index("--auth-supernode-private-key")
    said = refused(superlink, "keyless", *command[:at], *command[at + 2 :])
    assert "Exit Code: 305" in said and "[code: 2001]" in said and "must be registered via the CLI" in " ".join(said.split()), (
        said
    )


def test_a_site_that_trusts_another_authority_turns_away(superlink: Federation, tmp_path: Path) -> None:
    superlink_files(tmp_path, [], days=1)
    superlink.register("elsewhere")
    said = refused(superlink, "elsewhere", *superlink.supernode_command("elsewhere", ca=tmp_path / "ca.crt"))
    assert "CERTIFICATE_VERIFY_FAILED" in said, said


def test_a_site_that_speaks_plain_http_is_refused(superlink: Federation) -> None:
    address = f"{LOOPBACK}:{superlink.port}"
    command = ["flower-supernode", "--insecure", "--superlink", address, "--host", LOOPBACK, "--port", str(free_port())]
    said = refused(superlink, "plain", *command, "--max-retries", "1")
    assert "Failed to initialize the connection" in said
    with_key = [*command, "--auth-supernode-private-key", str(superlink.keys("plain"))]
    assert "requires a secure TLS connection" in " ".join(refused(superlink, "plain", *with_key).split())


def test_an_operator_without_tls_or_with_another_authority_is_refused(superlink: Federation, tmp_path: Path) -> None:
    superlink_files(tmp_path, [], days=1)
    superlink.connect("plain", superlink.port, insecure=True)
    superlink.connect("foreign", superlink.port, **{"root-certificates": str(tmp_path / "ca.crt")})
    for connection in ("plain", "foreign"):
        for command in (["supernode", "list", connection], ["run", str(ROOT), connection]):
            done = superlink.try_flwr(*command)
            assert done.returncode == 1 and "Connection to the SuperLink is un" in done.stderr, done.stdout + done.stderr
    assert superlink.try_flwr("supernode", "list", "test").returncode == 0
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(f"http://{LOOPBACK}:{superlink.port}/health", timeout=5)


def test_a_superlink_does_not_start_with_node_authentication_but_without_tls(superlink: Federation) -> None:
    node = superlink.start(
        "careless", "flower-superlink", "--insecure", "--enable-supernode-auth", "--host", LOOPBACK, "--port", str(free_port())
    )
    assert node.exit_code() == 1 and "requires encrypted TLS" in " ".join(node.said().split())


def test_an_expired_certificate_turns_sites_and_operators_away(tmp_path: Path) -> None:
    with Federation(tmp_path) as federation:
        authority, key = _read_authority(federation.certificates)
        yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
        names = [_general_name(name) for name in ALWAYS]
        expired, its_key = make_certificate(authority, key, names, yesterday - datetime.timedelta(days=1), yesterday)
        old = tmp_path / "old"
        old.mkdir()
        (old / "ca.crt").write_bytes((federation.certificates / "ca.crt").read_bytes())
        (old / "superlink.crt").write_bytes(expired.public_bytes(Encoding.PEM))
        (old / "superlink.key").write_bytes(its_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        superlink = federation.start_superlink(certificates=old)
        assert not federation.healthy()
        node = federation.start("north", *federation.supernode_command("north"))
        assert node.exit_code() == 1 and "certificate has expired" in node.said()
        for command in (["supernode", "list", "test"], ["run", str(ROOT), "test"]):
            done = federation.try_flwr(*command)
            assert done.returncode == 1 and "Connection to the SuperLink is un" in done.stderr, done.stdout + done.stderr
        superlink.kill()
        federation.start_superlink()  # renewed, by the same authority: nothing changes on the sites
        assert federation.healthy()
