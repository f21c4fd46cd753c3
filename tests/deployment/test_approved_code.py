"""Sites that approve code, on a real federation: what is not approved never runs, and what is approved goes on running."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import psutil
import pytest

from lalora_flwr.engines.bundle import read_bundle
from tests.deployment.federation import ROOT, SITE_START, Federation, save_texts, text_run, wait_for

pytestmark = pytest.mark.slow
RUNS_UNSEEN = "import os, pathlib\nif {}: pathlib.Path(os.environ['FLWR_HOME'], 'ran').touch()\n"


def app_with(folder: Path, condition: str) -> Path:
    """A copy of this app whose ClientApp leaves a file on the site if the condition holds: one byte tells the copies apart."""
    if not folder.exists():
        shutil.copytree(ROOT / "lalora_flwr", folder / "lalora_flwr", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("README.md", "LICENSE", "pyproject.toml", ".gitignore"):
            shutil.copy(ROOT / name, folder / name)
    text = (ROOT / "lalora_flwr" / "client_app.py").read_text()
    (folder / "lalora_flwr" / "client_app.py").write_text(text + RUNS_UNSEEN.format(condition))
    return folder


def test_a_changed_bundle_runs_on_the_open_site_only_and_the_pinned_site_goes_on(tmp_path: Path) -> None:
    records = save_texts(tmp_path / "records.csv", 60, seed=1)
    approved = read_bundle(app_with(tmp_path / "app", "0")).digest
    with Federation(tmp_path) as federation:
        federation.start_superlink()
        federation.add_sites({"open": records}, {"device": "cpu"}, start=SITE_START)
        federation.add_sites({"pinned": records}, {"device": "cpu", "approved-code": approved}, start=SITE_START)
        assert "runs whatever code the operator sends" in federation.process("open").said()
        assert "warning" not in federation.process("pinned").said()

        changed = app_with(tmp_path / "app", "1")
        run = federation.submit(text_run(tmp_path, num_rounds=1, run_name="changed"), app=changed)
        federation.wait(run)
        assert (tmp_path / "open" / "ran").exists(), federation.logs(run)
        assert not (tmp_path / "pinned" / "ran").exists() and not (tmp_path / "pinned" / "apps").exists()
        assert "could not be verified" in federation.logs(run)
        said = federation.process("pinned").said()
        assert f"refused the app bundle {read_bundle(changed).digest}: its digest is not in the site's approved-code" in said

        run = federation.submit(text_run(tmp_path, num_rounds=1), app=app_with(tmp_path / "app", "0"))
        assert federation.wait(run) == "finished:completed", federation.logs(run)
        summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
        assert summary["failures"] == 0 and len(summary["sites"]) == 2
        assert not (tmp_path / "pinned" / "ran").exists()
