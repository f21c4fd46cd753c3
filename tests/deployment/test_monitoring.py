"""A real federation that is watched: a tracker and a metrics file on the server, metrics files on the sites, logs as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lalora_flwr.ground.prometheus import samples_of
from lalora_flwr.ledger.entries import Reserve
from lalora_flwr.ledger.file import LedgerFile
from tests.deployment.federation import ROOT, SITE_START, Federation
from tests.deployment.texts import save_texts, text_run


def values(path: Path, name: str) -> list[float]:
    return [value for (found, _), value in samples_of(path.read_text()).items() if found == name]


def objects(text: str) -> list[dict[str, str]]:
    """The lines that are JSON objects; what programs print themselves is between them."""
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"time"')]


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_a_run_and_its_sites_can_be_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("LALORA_LOG", "json")
    records = {name: save_texts(tmp_path / f"{name}.csv", 60, seed=1) for name in ("north", "east")}
    own = {name: {"metrics-path": str(tmp_path / f"{name}.prom"), "alert-epsilon": 0.5} for name in records}
    own["east"] |= {"resident-seconds": 0, "max-queries-per-day": 1}
    with Federation(tmp_path) as federation:
        federation.start_superlink()
        federation.add_sites(records, {"device": "cpu"}, own=own, start=SITE_START)
        started = {name: values(tmp_path / f"{name}.prom", "lalora_site_epsilon_spent") for name in records}
        asked = {**text_run(tmp_path), "track": "tensorboard", "metrics-file": str(tmp_path / "run.prom"), "max-failures": 1}
        run = federation.submit(asked, ROOT)
        assert federation.wait(run) == "finished:completed", federation.logs(run)
        said = {name: federation.process(name).said() for name in records}
        of_run = federation.try_flwr("log", run, "test", "--show").stdout
    assert started == {"north": [0.0], "east": [0.0]}  # there is a file before the first message
    for name, rounds in (("north", 2), ("east", 1)):
        entries = LedgerFile(federation.ledger(name)).read().entries
        spent = [entry.epsilon for entry in entries if isinstance(entry, Reserve)]
        path = tmp_path / f"{name}.prom"
        assert values(path, "lalora_site_rounds_total") == [rounds] and len(spent) == rounds
        assert values(path, "lalora_site_epsilon_spent") == spent[-1:] and values(path, "lalora_site_alert") == [1]
        lines = objects(said[name])
        assert [line["level"] for line in lines if "has reached alert-epsilon" in line["message"]] == ["WARNING"]
        assert sum("reserved 2 steps" in line["message"] for line in lines) == rounds
    assert values(tmp_path / "east.prom", "lalora_site_refusals_total") == [1]
    assert values(tmp_path / "run.prom", "lalora_run_refusals_total") == [1]
    assert values(tmp_path / "run.prom", "lalora_run_rounds_total") == [2]
    folder = tmp_path / "runs" / "run"
    assert json.loads((folder / "tracking.json").read_text()) == {"tensorboard": {"round": 2}}
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    assert any("results are in" in line["message"] for line in objects(of_run)), of_run
