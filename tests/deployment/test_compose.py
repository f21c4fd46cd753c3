"""docker/ as far as it can be tested without an engine: Flower's own parsers, paths, limits, secrets, and the versions."""

from __future__ import annotations

import re
import runpy
import sqlite3
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.common.config import parse_config_args
from flwr.superlink.routers.control import router as control_router
from flwr.superlink.routers.fleet.router import router as fleet_router
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lalora_flwr.engines.supernode import approved_digests
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ledger.caps import NEEDED, caps_from
from lalora_flwr.ledger.file import create
from tests.deployment.federation import ROOT
from tests.deployment.flags import superlink_flags, supernode_flags

DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SITES = [name for name in SERVICES if name.startswith("supernode")]
VARIABLE = re.compile(r"\$\{\w+:-([^}]*)\}")
SECRETS = "/run/secrets"


def filled(text: str) -> str:
    """With the default of each variable."""
    return VARIABLE.sub(r"\1", text)


def command(service: str) -> list[str]:
    return [filled(word) for word in SERVICES[service]["command"]]


def mounts(service: str) -> dict[str, tuple[str, bool]]:
    """Path in the container -> path on the host, and whether it is read-only."""
    found = {}
    for volume in SERVICES[service]["volumes"]:
        source, target, *options = volume.split(":")
        found[target] = (source, options == ["ro"])
    return found


def lies_in(path: str, service: str) -> str | None:
    return next((target for target in mounts(service) if Path(path).is_relative_to(target)), None)


def secrets(service: str) -> dict[str, str]:
    """Path in the container -> path on the host."""
    return {f"{SECRETS}/{name}": COMPOSE["secrets"][name]["file"] for name in SERVICES[service]["secrets"]}


def test_the_superlink_speaks_tls_and_authenticates_nodes() -> None:
    program, *arguments = command("superlink")
    flags = superlink_flags(arguments)
    assert program == "flower-superlink"
    assert flags.enable_supernode_auth and not flags.insecure and not flags.runtime_dependency_install
    assert flags.host == "0.0.0.0" and flags.port == 8000
    for path in (flags.ssl_ca_certfile, flags.ssl_certfile):
        assert mounts("superlink")[path][1]
    assert flags.ssl_keyfile in secrets("superlink")
    assert lies_in(flags.database, "superlink") == "/state"
    assert SERVICES["superlink"]["ports"] == ["127.0.0.1:8001:8000"] and SERVICES["superlink"]["networks"] == ["control"]


@pytest.mark.parametrize("site", SITES)
def test_a_site_has_its_own_key_data_and_ledger(site: str) -> None:
    flags, volumes = supernode_flags(command(site)), mounts(site)
    assert not flags.insecure and flags.superlink == "gateway:8000" and flags.host == "127.0.0.1"
    number = site.removeprefix("supernode-")
    assert volumes[flags.root_certificates][1]
    assert secrets(site) == {flags.auth_supernode_private_key: f"./site-{number}/keys/site-{number}"}
    with pytest.raises(ConfigError, match="approved-code must be digests"):  # unless the owner gives APPROVED_CODE
        approved_digests(flags)
    config = parse_config_args([flags.node_config.replace('approved-code=""', f'approved-code="{"0" * 64}"')])
    assert set(NEEDED) <= set(config) and caps_from(config, needed=True)
    for key, read_only in (("data-path", True), ("model-path", True), ("ledger-path", False)):
        place = lies_in(config[key], site)
        assert place and volumes[place][1] is read_only, key
    own = {source for source, _ in volumes.values()} - {"./certificates/ca.crt", "./model"}
    assert own and all(source.startswith(f"./site-{number}/") for source in own)
    assert SERVICES[site]["networks"] == ["fleet"] and "ports" not in SERVICES[site]


def test_no_container_is_root_or_can_become_it() -> None:
    assert set(SERVICES) == {"superlink", "gateway", *SITES} and len(SITES) == 2
    for service in SERVICES.values():
        assert service["user"] == "${LALORA_UID:-1000}:${LALORA_GID:-1000}"
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.search(r"^USER 1000:1000$", (ROOT / "docker" / "Dockerfile").read_text(), re.MULTILINE)


def test_every_network_and_dependency_is_declared() -> None:
    for service in SERVICES.values():
        assert set(service["networks"]) <= set(COMPOSE["networks"])
        assert set(service.get("depends_on", [])) <= set(SERVICES)


def test_the_gateway_lets_sites_pass_to_the_fleet_api_only() -> None:
    assert fleet_router.prefix == "/v1/fleet" and control_router.prefix == "/v1/control"
    text = (ROOT / "docker" / "gateway.conf").read_text()
    locations = re.findall(r"location (\S+) \{\s*(.*?)\s*\}", text, re.DOTALL)
    assert [place for place, _ in locations] == ["/v1/fleet/", "/"]
    assert locations[1][1] == "return 403;" and "proxy_ssl_verify on;" in locations[0][1]
    assert "proxy_pass https://superlink:8000;" in locations[0][1]
    files = set(re.findall(r" (/\S+\.(?:crt|key));", text))
    assert len(files) == 3 and files <= {*mounts("gateway"), *secrets("gateway")}


def test_the_image_has_the_versions_that_the_tests_run_with() -> None:
    """Which `make` installs. In an environment made by hand: `pip install -c docker/constraints.txt -e ".[dev]"`."""
    made = runpy.run_path(str(DOCKER / "pins.py"))
    assert (DOCKER / "constraints.txt").read_text().splitlines() == [made["HEAD"], *made["pins"]()]


def test_the_image_has_what_the_project_needs_and_allows() -> None:
    pins = dict(line.split("==") for line in (DOCKER / "constraints.txt").read_text().splitlines()[1:])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
    assert not pins.keys() & {"ray", "matplotlib", "scikit-learn", "seaborn"}
    dockerfile = (DOCKER / "Dockerfile").read_text()
    python = re.search(r"^ARG PYTHON_IMAGE=(python:(\d+\.\d+\.\d+)-slim-\w+)\nFROM \$\{PYTHON_IMAGE\}$", dockerfile, re.MULTILINE)
    assert python and Requirement(f"python{project['requires-python']}").specifier.contains(python[2])
    assert f"lalora-flwr:{project['version']}" == SERVICES["superlink"]["image"]
    assert filled(SERVICES["superlink"]["build"]["args"]["PYTHON_IMAGE"]) == python[1]
    assert set(SERVICES["superlink"]["build"]["args"]) == set(re.findall(r"^ARG (\w+)", dockerfile, re.MULTILINE))
    allowed = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    for line in dockerfile.splitlines():
        if line.startswith("COPY"):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists() and f"!{source}" in allowed, source


def test_no_service_can_take_the_whole_machine() -> None:
    for name, service in SERVICES.items():
        assert re.fullmatch(r"\d+[mg]", filled(service["mem_limit"])), name
        assert 0 < service["pids_limit"] <= 4096
        options = service["logging"]["options"]
        assert service["logging"]["driver"] == "json-file" and options["max-size"].endswith("m") and int(options["max-file"]) > 1


def test_keys_are_secrets_and_nothing_else_mounts_them() -> None:
    used = {name for service in SERVICES.values() for name in service["secrets"]}
    assert used == set(COMPOSE["secrets"])
    files = {secret["file"] for secret in COMPOSE["secrets"].values()}
    assert all(re.search(r"\.key$|/keys/", file) for file in files)
    for service in SERVICES:
        for source, _ in mounts(service).values():
            assert not any(file == source or file.startswith(f"{source}/") for file in files), source


def test_every_service_says_whether_it_is_up() -> None:
    assert all(service["healthcheck"]["test"][0].startswith("CMD") for service in SERVICES.values())
    pid = re.search(r"^pid (\S+);$", (DOCKER / "gateway.conf").read_text(), re.MULTILINE)
    assert pid and pid[1] in SERVICES["gateway"]["healthcheck"]["test"][1]
    dockerfile = (DOCKER / "Dockerfile").read_text()
    assert re.search(r"^WORKDIR /app$", dockerfile, re.MULTILINE) and "COPY docker/site_health.py ./" in dockerfile
    for site in SITES:
        _, python, script, ledger = SERVICES[site]["healthcheck"]["test"]
        assert (python, script) == ("python", "/app/site_health.py")
        assert f'ledger-path="{ledger}"' in supernode_flags(command(site)).node_config


class Answers(BaseHTTPRequestHandler):
    """A SuperNode, as far as the health check asks it."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


def test_a_site_is_up_if_its_supernode_answers_and_its_ledger_is_whole(tmp_path: Path) -> None:
    fault, ledger = runpy.run_path(str(DOCKER / "site_health.py"))["fault"], tmp_path / "ledger.db"
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as supernode:
        threading.Thread(target=supernode.serve_forever, daemon=True).start()
        assert "no such file" in fault(str(ledger), supernode.server_port)
        create(ledger)
        assert fault(str(ledger), supernode.server_port) == ""
        with sqlite3.connect(ledger) as connection:
            connection.execute("DROP TRIGGER no_update")
        assert "schema was changed" in fault(str(ledger), supernode.server_port)
        supernode.shutdown()
    assert "does not answer" in fault(str(ledger), supernode.server_port)
