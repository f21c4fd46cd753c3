"""docs/operate.md against a real federation on loopback: its commands, in the order of a deployment's life."""

from __future__ import annotations

import configparser
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink

from lalora_flwr.ledger.file import create as create_ledger
from tests.deployment.federation import SITE_START, Federation
from tests.deployment.processes import LOOPBACK, wait_for
from tests.deployment.texts import save_texts, text_run
from tests.docs.blocks import Block, blocks, of_section


def test_the_units_start_what_the_guide_of_deployments_starts() -> None:
    superlink, gateway = (block.text for block in blocks("operate", "ini"))
    read = configparser.ConfigParser(strict=False, interpolation=None)
    read.read_string(superlink)
    program, *arguments = shlex.split(read["Service"]["ExecStart"])
    flags = _parse_args_run_superlink().parse_args(arguments)
    assert Path(program).name == "flower-superlink" and flags.host == LOOPBACK and flags.port == 8001
    assert flags.enable_supernode_auth and not flags.insecure and not flags.runtime_dependency_install
    writable = read["Service"]["ReadWritePaths"].split()
    assert str(Path("/srv/lalora", flags.database).parent) in writable
    assert 'nginx -c /srv/lalora/gateway.conf -g "daemon off;"' in gateway


class Deployment:
    """A federation whose folders look as the page says."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        self.operator, self.site = federation.folder / "op", federation.folder / "north-site"
        for folder in (self.operator / "keys", self.site / "ledger", self.site / "other", self.site / "keys"):
            folder.mkdir(parents=True)
        (self.operator / "state").symlink_to(federation.folder)  # where state.db is
        (self.operator / "certificates").symlink_to(federation.certificates)
        federation.connect("deployment", federation.port)
        create_ledger(self.site / "ledger" / "ledger.db")

    def run(self, block: Block, ok: bool = True, **variables: str) -> str:
        folder = {"operator": self.operator, "site": self.site}[block.folder]
        done = block.run(folder, {**os.environ, **self.federation.environment("operator"), **variables})
        assert (done.returncode == 0) is ok, f"{block.text}{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def give(self, key: Path) -> None:
        """A site's public key to the operator."""
        (self.operator / "keys" / key.name).write_bytes(key.read_bytes())

    def finish(self, name: str) -> None:
        run = self.federation.submit(text_run(self.federation.folder, run_name=name))
        assert self.federation.wait(run) == "finished:completed", self.federation.logs(run)

    def ports(self, name: str) -> set[tuple[str, int]]:
        """What a member and all that it started listen to."""
        running = self.federation.process(name)
        family = [psutil.Process(running.popen.pid), *running.descendants()]
        found = [c.laddr for process in family for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        return {(address.ip, address.port) for address in found}


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with Federation(tmp_path) as federation:
        federation.start_superlink()
        deployment = Deployment(federation)
        north, south = save_texts(tmp_path / "north.csv", 60, seed=1), save_texts(tmp_path / "south.csv", 70, seed=2)
        own = {"ledger-path": str(deployment.site / "ledger" / "ledger.db")}
        own["witness-path"] = str(deployment.site / "other" / "witness")
        federation.add_sites({"north": north, "south": south}, {"device": "cpu"}, own={"north": own}, start=SITE_START)
        yield deployment


def only(heading: str, number: int = 0) -> Block:
    return [block for block in of_section("operate", heading) if not block.needs][number]


@pytest.mark.slow
@pytest.mark.nightly
def test_the_commands_of_the_page(deployment: Deployment) -> None:
    federation = deployment.federation
    assert deployment.ports("superlink") == {(LOOPBACK, federation.port)}
    (own,) = deployment.ports("north")
    assert own[0] == LOOPBACK

    # which node is whom
    deployment.give(federation.keys("west").with_suffix(".pub"))
    said = deployment.run(only("Which node is whom"))
    west = next(word for word in said.split() if word.isdigit())
    assert "registered successfully" in said
    assert f"{west} west registered" in deployment.run(only("Which node is whom", 1))

    # two runs at once share a budget
    runs = [federation.submit(text_run(federation.folder, run_name=name)) for name in ("first", "second")]
    listed = deployment.run(only("Two runs at once"))
    assert all(run in listed for run in runs)
    assert [federation.wait(run) for run in runs] == ["finished:completed"] * 2, federation.logs(runs[0])

    # a ledger that is backed up, goes on, and is put back
    assert '"kind"' in deployment.run(only("The ledger")) and (deployment.site / "backup" / "ledger.db").exists()
    deployment.finish("third")
    _in_order(federation, "north")
    assert "which are not there" in deployment.run(only("Restore a ledger"), ok=False)
    deployment.run(only("Restore a ledger", 1))
    deployment.run(only("Upgrades"))
    assert federation.start_site("north").alive()

    # the SuperLink's state, put back
    assert "ok" in deployment.run(only("The SuperLink")).split()
    _in_order(federation, "superlink")
    (federation.folder / "state.db").write_bytes((deployment.operator / "backup" / "state.db").read_bytes())
    for rest in ("state.db-wal", "state.db-shm"):
        (federation.folder / rest).unlink(missing_ok=True)
    federation.start_superlink()
    wait_for("the sites to come back", lambda: federation.online() == 2, patience=120, every=2)

    _keys(deployment)
    _certificates(deployment)


def _in_order(federation: Federation, name: str) -> None:
    federation.process(name).terminate()


def _online(federation: Federation) -> set[str]:
    return {node["node-id"] for node in federation.flwr("supernode", "list", "test")["nodes"] if node["status"] == "online"}


def _keys(deployment: Deployment) -> None:
    """A new key for a site is a new node; the old one is sent away, and its key never comes back."""
    federation, before = deployment.federation, _online(deployment.federation)
    _in_order(federation, "north")
    wait_for("north to be gone", lambda: len(_online(federation)) == 1, every=1)
    (north,) = before - _online(federation)
    federation.start_site("north")
    deployment.run(only("A new key for a site"))
    key = deployment.site / "keys" / "north-2"
    deployment.give(key.with_suffix(".pub"))
    assert "registered successfully" in deployment.run(only("A new key for a site", 1))
    deployment.run(only("Remove a site"), NODE_ID=north)
    assert federation.process("north").exit_code() is not None
    again = federation.start("again", *federation._sites["north"])
    assert again.exit_code() == 1 and "Failed to activate SuperNode" in again.said()
    refused = federation.try_flwr("supernode", "register", f"{federation.keys('north')}.pub", "test")
    assert refused.returncode == 1 and "Public key already in use." in refused.stdout + refused.stderr
    command = [str(key) if word == str(federation.keys("north")) else word for word in federation._sites["north"]]
    federation._sites["north"] = command
    federation.start_site("north")
    assert len(_online(federation)) == 2


def _certificates(deployment: Deployment) -> None:
    """A renewed certificate changes nothing at the sites; a new authority is first trusted beside the old one."""
    federation = deployment.federation
    old = (federation.certificates / "superlink.crt").read_bytes()
    deployment.run(only("A new certificate of the SuperLink"))
    assert (federation.certificates / "superlink.crt").read_bytes() != old
    _in_order(federation, "superlink")
    federation.start_superlink()
    assert federation.healthy()
    wait_for("the sites to come back", lambda: federation.online() == 2, patience=120, every=2)

    deployment.run(only("A new authority"))
    both = deployment.operator / "both.crt"
    _in_order(federation, "north")
    trusted = {str(federation.certificates / "ca.crt"): str(both)}
    federation._sites["north"] = [trusted.get(word, word) for word in federation._sites["north"]]
    federation.start_site("north")
    _in_order(federation, "superlink")
    federation.start_superlink(certificates=deployment.operator / "certificates-2")
    federation.connect("new", federation.port, **{"root-certificates": str(both)})
    wait_for("the site that trusts both", lambda: _named(federation, "new") == 1, patience=120, every=2)


def _named(federation: Federation, connection: str) -> int:
    nodes = federation.flwr("supernode", "list", connection)["nodes"]
    return sum(node["status"] == "online" for node in nodes)


def test_every_block_has_a_folder_or_says_why_it_is_not_run() -> None:
    assert all(bool(block.needs) != (block.folder in ("operator", "site")) for block in blocks("operate"))
