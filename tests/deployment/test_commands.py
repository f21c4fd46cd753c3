"""The commands of docker/ and docs/deploy.md against Flower's own parsers: a flag that Flower drops fails here."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.common.config import parse_config_args
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
from flwr.superlink.routers.control import router as control_router
from flwr.superlink.routers.fleet.router import router as fleet_router
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.main import get_command

from lalora_flwr.cli.main import app
from lalora_flwr.engines.supernode import approved_digests, parse_arguments
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ledger.caps import NEEDED, caps_from
from lalora_flwr.settings import read_toml, settings_from
from tests.deployment.federation import ROOT

COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SITE_START = ["lalora", "site", "start", "--"]  # in place of flower-supernode, whose arguments follow
DEPLOY = (ROOT / "docs" / "deploy.md").read_text()
VARIABLE = re.compile(r"\$\{\w+:-([^}]*)\}")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", DEPLOY, re.DOTALL | re.MULTILINE)


def documented(program: str) -> list[list[str]]:
    """The arguments of each call of a program in the guide, its variables filled in."""
    found, variables = [], {"PWD": "/here", "site": "site-1"}
    for line in "\n".join(blocks("bash")).replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = line.replace(f'"${name}"', shlex.quote(value)).replace(f"${name}", value)
        words = shlex.split(line)
        if len(words) == 1 and (assigned := re.fullmatch(r"(\w+)=(.*)", words[0])):
            variables[assigned[1]] = assigned[2]
        while words and re.match(r"[A-Z_]+=", words[0]):
            del words[0]
        if program in words[:1]:
            found.append(words[1:])
    return found


def superlink_flags(arguments: list[str]) -> Any:
    """What Flower makes of the arguments; an unknown flag ends the test."""
    return _parse_args_run_superlink().parse_args(arguments)


def supernode_flags(words: list[str]) -> Any:
    """The same, of a site's whole command."""
    assert words[:4] == SITE_START
    return parse_arguments(words[4:])


def command(service: str) -> list[str]:
    return [VARIABLE.sub(r"\1", word) for word in SERVICES[service]["command"]]


def mounts(service: str) -> dict[str, tuple[str, bool]]:
    """Path in the container -> path on the host, and whether it is read-only."""
    found = {}
    for volume in SERVICES[service]["volumes"]:
        source, target, *options = volume.split(":")
        found[target] = (source, options == ["ro"])
    return found


def lies_in(path: str, service: str) -> str | None:
    return next((target for target in mounts(service) if Path(path).is_relative_to(target)), None)


SITES = [name for name in SERVICES if name.startswith("supernode")]


def test_the_superlink_speaks_tls_and_authenticates_nodes() -> None:
    program, *arguments = command("superlink")
    flags = superlink_flags(arguments)
    assert program == "flower-superlink"
    assert flags.enable_supernode_auth and not flags.insecure and not flags.runtime_dependency_install
    assert flags.host == "0.0.0.0" and flags.port == 8000
    for path in (flags.ssl_ca_certfile, flags.ssl_certfile, flags.ssl_keyfile):
        assert mounts("superlink")[path][1]
    assert lies_in(flags.database, "superlink") == "/state"
    assert SERVICES["superlink"]["ports"] == ["127.0.0.1:8001:8000"] and SERVICES["superlink"]["networks"] == ["control"]


@pytest.mark.parametrize("site", SITES)
def test_a_site_has_its_own_key_data_and_ledger(site: str) -> None:
    flags, volumes = supernode_flags(command(site)), mounts(site)
    assert not flags.insecure and flags.superlink == "gateway:8000" and flags.host == "127.0.0.1"
    assert volumes[flags.root_certificates][1] and volumes[flags.auth_supernode_private_key][1]
    with pytest.raises(ConfigError, match="approved-code must be digests"):  # unless the owner gives APPROVED_CODE
        approved_digests(flags)
    config = parse_config_args([flags.node_config.replace('approved-code=""', f'approved-code="{"0" * 64}"')])
    assert set(NEEDED) <= set(config) and caps_from(config, needed=True)
    for key, read_only in (("data-path", True), ("model-path", True), ("ledger-path", False)):
        place = lies_in(config[key], site)
        assert place and volumes[place][1] is read_only, key
    number = site.removeprefix("supernode-")
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
    files = set(re.findall(r"/certificates/\S+(?=;)", text))
    assert files <= set(mounts("gateway"))


def test_the_image_has_the_versions_that_the_project_allows() -> None:
    pins = dict(line.split("==") for line in (ROOT / "docker" / "constraints.txt").read_text().splitlines() if line[0] != "#")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    assert re.search(r"^FROM python:3\.\d+\.\d+-slim", dockerfile, re.MULTILINE)
    python = re.search(r"FROM python:([\d.]+)", dockerfile)
    assert python and Requirement(f"python{project['requires-python']}").specifier.contains(python[1])
    assert f"lalora-flwr:{project['version']}" == SERVICES["superlink"]["image"]
    for line in dockerfile.splitlines():
        if line.startswith("COPY"):
            assert all((ROOT / source).exists() for source in line.split()[1:-1]), line


def test_the_guides_superlink_listens_to_its_own_machine_only() -> None:
    calls = list(map(superlink_flags, documented("flower-superlink")))
    assert calls
    for flags in calls:
        assert not flags.insecure and flags.enable_supernode_auth and flags.host == "127.0.0.1"
    before, _, after = DEPLOY.partition("0.0.0.0")
    assert before.splitlines()[-1].startswith("> **Exception") and "0.0.0.0" not in after


def test_the_guides_proxy_lets_sites_pass_to_that_superlink(tmp_path: Path) -> None:
    (flags,) = map(superlink_flags, documented("flower-superlink"))
    edit = next(line for line in "\n".join(blocks("bash")).splitlines() if line.startswith("sed ") and "gateway.conf" in line)
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "gateway.conf").write_text((ROOT / "docker" / "gateway.conf").read_text())
    subprocess.run(["sh", "-ec", edit], cwd=tmp_path, check=True, env={**os.environ, "PWD": str(tmp_path)})
    text = (tmp_path / "gateway.conf").read_text()
    assert f"proxy_pass https://{flags.host}:{flags.port};" in text and "superlink:8000" not in text
    files = re.findall(r" (/\S+\.(?:crt|key));", text)
    assert len(files) == 3 and all(Path(file).parent == tmp_path / "certificates" for file in files)


def test_the_guides_sites_start_checked_and_with_approved_code() -> None:
    calls = [["lalora", *call] for call in documented("lalora") if call[:2] == ["site", "start"]]
    (unit,) = blocks("ini")
    (started,) = re.findall(r"^ExecStart=\S+/(lalora .*)$", unit, re.MULTILINE)
    assert calls and not documented("flower-supernode")
    (config,) = {call[2] for call in documented("lalora") if call[:2] == ["site", "check"]}
    for words in [*calls, shlex.split(started.replace("${NODE_CONFIG}", shlex.quote(config)))]:
        flags = supernode_flags(words)
        assert not flags.insecure and flags.node_config == config and approved_digests(flags)
        assert caps_from(parse_config_args([config]), needed=True)


def test_the_guides_other_commands_parse() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    calls = documented("lalora")
    assert {call[0] for call in calls} == {"certs", "ledger", "plan", "site"}
    for name, *arguments in calls:
        called = commands[name]
        if name in ("ledger", "site"):
            called, arguments = called.commands[arguments[0]], arguments[1:]
        called.make_context(name, list(arguments))


def test_the_guides_run_is_a_valid_one(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(next(text for text in blocks("toml") if "num-rounds" in text))
    settings = settings_from(read_toml(tmp_path / "run.toml"))
    assert settings.data.name == "sites" and settings.private
    connection = next(tomllib.loads(text) for text in blocks("toml") if "superlink" in text)
    assert connection["superlink"]["deployment"]["root-certificates"].endswith("ca.crt")


def test_the_guide_names_where_the_node_config_is_described() -> None:
    assert "[site.md](site.md)" in DEPLOY
