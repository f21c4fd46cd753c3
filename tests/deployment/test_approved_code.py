"""Two sites on a real federation that `lalora site start` started; one of them approved one app bundle, the other none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from lalora_flwr.site.bundle import read_bundle
from tests.deployment.federation import ROOT, SITE_START, Federation
from tests.deployment.processes import Running, lives, wait_for
from tests.deployment.texts import save_texts, text_run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")]
LEAVES_A_FILE = "import os, pathlib\nif {}: pathlib.Path(os.environ['FLWR_HOME'], 'ran').touch()\n"


def app(folder: Path, condition: str) -> Path:
    """A copy of this app whose ClientApp leaves a file on the site if the condition holds: one byte tells two copies apart."""
    if not folder.exists():
        shutil.copytree(ROOT / "lalora_flwr", folder / "lalora_flwr", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("README.md", "LICENSE", "pyproject.toml", ".gitignore"):
            shutil.copy(ROOT / name, folder / name)
    text = (ROOT / "lalora_flwr" / "client_app.py").read_text()
    (folder / "lalora_flwr" / "client_app.py").write_text(text + LEAVES_A_FILE.format(condition))
    return folder


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    records = save_texts(folder / "records.csv", 60, seed=1)
    approved = {"approved-code": read_bundle(app(folder / "app", "0")).digest}
    with Federation(folder) as federation:
        federation.start_superlink()
        federation.add_sites({"open": records, "pinned": records}, {"device": "cpu"}, own={"pinned": approved}, start=SITE_START)
        yield federation


def test_a_changed_bundle_runs_on_the_open_site_only(federation: Federation) -> None:
    warning = "this site runs whatever code the operator sends"
    assert warning in federation.process("open").said() and warning not in federation.process("pinned").said()
    folder = federation.folder
    changed = app(folder / "app", "1")
    run = federation.submit(text_run(folder, num_rounds=1, run_name="changed"), app=changed)
    federation.wait(run)
    assert (folder / "open" / "ran").exists(), federation.logs(run)  # the bundle's copy runs, not the installed package
    assert not (folder / "pinned" / "ran").exists() and not (folder / "pinned" / "apps").exists()
    failure = json.loads((folder / "runs" / "changed" / "failure.json").read_text())
    assert "1 of 2 sites" in failure["error"] and "The FAB could not be verified." in failure["error"]
    said = federation.process("pinned").said()
    assert f"refused the app bundle {read_bundle(changed).digest}: its digest is not in the site's approved-code" in said


def test_an_approved_bundle_serves_on_both_sites(federation: Federation) -> None:
    folder = federation.folder
    run = federation.submit(text_run(folder, num_rounds=1), app=app(folder / "app", "0"))
    assert federation.wait(run) == "finished:completed", federation.logs(run)
    summary = json.loads((folder / "runs" / "run" / "summary.json").read_text())
    assert summary["failures"] == 0 and len(summary["sites"]) == 2
    assert (folder / "pinned" / "apps").exists() and not (folder / "pinned" / "ran").exists()


def test_a_killed_site_leaves_no_process_even_if_its_client_app_cannot_act(federation: Federation) -> None:
    """A stopped process looks for no parent and takes no signal but SIGKILL."""
    federation.submit(text_run(federation.folder, num_rounds=1, run_name="killed"), app=app(federation.folder / "app", "0"))
    site = federation.process("pinned")
    working = wait_for("a ClientApp", lambda: client_app(site))
    working.suspend()
    helpers = site.descendants()
    site.kill()
    wait_for("the end of its helpers", lambda: not any(map(lives, helpers)))


def client_app(site: Running) -> psutil.Process | None:
    """The site's ClientApp, once it has become the real command."""
    for process in site.descendants("flwr-clientapp"):
        with suppress(psutil.Error):
            if "with_parent.py" not in (line := " ".join(process.cmdline())) and "/lalora/bin/" not in line:
                return process
    return None


def test_a_site_that_is_asked_to_stop_stops_in_order(federation: Federation) -> None:
    site = federation.process("open")
    helpers = site.descendants()
    site.terminate()
    assert site.popen.returncode == 0 and "SuperNode terminated gracefully" in site.said()
    wait_for("the end of its helpers", lambda: not any(map(lives, helpers)))
