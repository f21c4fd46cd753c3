"""A real federation of light installs: SuperLink, checked sites and their health, trainers, ledgers, a verified run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest

from lalora_flwr.ledger.file import create
from tests.deployment.federation import CAPS, SITE_START, Federation
from tests.deployment.texts import save_texts, text_run
from tests.install.made import ROOT, Install


class Installed(Federation):
    """A federation whose members all use one install, and not that of the tests."""

    def __init__(self, folder: Path, install: Install) -> None:
        super().__init__(folder)
        self._install = install

    def environment(self, who: str) -> dict[str, str]:
        own = {name: value for name, value in super().environment(who).items() if not name.startswith("PYTHON")}
        return {**own, "PATH": os.pathsep.join([str(self._install.folder / "bin"), *own["PATH"].split(os.pathsep)[1:]])}


@pytest.mark.slow
def test_a_run_of_real_sites(light: Install, tmp_path: Path) -> None:
    data = {name: save_texts(tmp_path / f"{name}.csv", 60, seed) for seed, name in enumerate(("north", "south"))}
    keys = text_run(tmp_path)
    ledger = tmp_path / "checked.ledger"
    create(ledger)
    config = {**CAPS, "data-path": str(data["north"]), "ledger-path": str(ledger), "model-path": str(tmp_path / "model")}
    text = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    checked = light.run(tmp_path, "lalora", "site", "check", text)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    with Installed(tmp_path, light) as federation:
        federation.start_superlink()
        federation.add_sites(data, start=SITE_START)
        run = federation.submit(keys)
        assert federation.wait(run).startswith("finished:completed"), federation.logs(run)
        for name in data:
            site = psutil.Process(federation.process(name).popen.pid).cmdline()
            assert str(light.folder) in " ".join(site), "another install"
            port = site[site.index("--port") + 1]
            health = light.run(tmp_path, "python", str(ROOT / "docker" / "site_health.py"), str(federation.ledger(name)), port)
            assert health.returncode == 0, health.stderr
        shown = light.run(tmp_path, "lalora", "ledger", "verify", str(federation.ledger("north")))
        assert shown.returncode == 0, shown.stderr
        ledgers = [str(federation.ledger(name)) for name in data]
        verified = light.run(tmp_path, "lalora", "verify", str(tmp_path / "runs" / "run"), *ledgers)
        assert verified.returncode == 0, verified.stdout + verified.stderr
    assert not (tmp_path / "runs" / "run" / "plots").exists()
