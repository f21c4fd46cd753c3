"""The commands of docs/deploy.md against Flower's own parsers."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

from flwr.common.config import parse_config_args
from typer.main import get_command

from lalora_flwr.cli.main import app
from lalora_flwr.engines.supernode import approved_digests
from lalora_flwr.ledger.caps import caps_from
from lalora_flwr.settings import read_toml, settings_from
from tests.deployment.federation import ROOT
from tests.deployment.flags import superlink_flags, supernode_flags

DEPLOY = (ROOT / "docs" / "deploy.md").read_text()


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
