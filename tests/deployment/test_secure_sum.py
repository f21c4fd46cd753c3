"""Real sites that share one noise over a real SuperLink; one is killed in the middle of a sum, then the server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lalora_flwr.cli.main import app
from lalora_flwr.ledger.entries import SharedReserve
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.privacy.accounting import epsilon_spent
from lalora_flwr.privacy.events import SampledGaussian
from tests.deployment.drill import Drill
from tests.deployment.federation import Federation
from tests.deployment.texts import save_texts, text_run

pytestmark = pytest.mark.faults
NAMES = ("north", "east", "south")


def make_rosters(folder: Path) -> dict[str, dict[str, str]]:
    """Keys and a roster for every site by the command that owners use; the node-config keys of each."""
    lines = []
    for name in NAMES:
        made = CliRunner().invoke(app, ["site", "keys", name, "--out", str(folder / "sharing")])
        assert made.exit_code == 0, made.output
        lines.append(made.stdout.splitlines()[0])
    (folder / "sharing" / "roster").write_text("\n".join(lines))
    roster = str(folder / "sharing" / "roster")
    return {n: {"sharing-key": str(folder / "sharing" / f"{n}.sharing.key"), "sharing-roster": roster} for n in NAMES}


def shared(federation: Federation, name: str) -> list[SharedReserve]:
    return [entry for entry in LedgerFile(federation.ledger(name)).read().entries if isinstance(entry, SharedReserve)]


def test_a_killed_site_spoils_an_attempt_and_a_killed_server_a_round(tmp_path: Path) -> None:
    data = {name: save_texts(tmp_path / f"{name}.csv", 60, seed=seed) for seed, name in enumerate(NAMES)}
    config = text_run(
        tmp_path,
        trust="secure-sum",
        train__local_steps=1,
        num_rounds=3,
        num_supernodes=3,
        max_failures=1,
        privacy__max_rounds=12,
        train__momentum=0.9,
    )
    with Federation(tmp_path) as federation:
        drill = Drill(federation, tmp_path, seed=5)
        superlink = federation.start_superlink()
        federation.add_sites(data, {"device": "cpu", "min-sharing-sites": 2}, own=make_rosters(tmp_path))
        federation.submit(config)
        drill.until("the first round", lambda: drill.rounds() or drill.ended())
        assert drill.at("south", "order", drill.ended), federation.logs("1")
        drill.kill_site("south", "order")
        drill.until("the round that it spoilt", lambda: drill.rounds() >= 2 or drill.ended())
        assert drill.lines()[1]["failures"] == 1 and drill.lines()[1]["repeats"] == 1, drill.lines()
        drill.until("south to be back", lambda: drill.connected("south") or drill.ended())
        if not drill.ended():
            drill.at("north", "order", drill.ended)
            drill.kill_app(superlink, "flwr-serverapp", "order")
            drill.until("the run's end", lambda: drill.ended() or not superlink.descendants("flwr-serverapp"))
        if not (drill.path / "summary.json").exists():
            run = federation.submit({**config, "resume": True})
            assert federation.wait(run) == "finished:completed", federation.logs(run)
        assert federation.process("superlink").alive()
        entries = {name: shared(federation, name) for name in NAMES}
        for name in NAMES:
            assert CliRunner().invoke(app, ["ledger", "verify", str(federation.ledger(name))]).exit_code == 0
            shown = CliRunner().invoke(app, ["ledger", "show", str(federation.ledger(name))]).stdout
            assert "if all other sites collude" in shown
        verified = CliRunner().invoke(app, ["verify", str(drill.path), *(str(federation.ledger(name)) for name in NAMES)])
        assert verified.exit_code == 0 and verified.stdout.count("of this run it counts") == len(NAMES), verified.output
    drill.report()
    assert (2, 2, 2) in {(entry.round, entry.attempt, entry.sites) for entry in entries["north"]}
    for own in entries.values():
        assert all(entry.share**2 * (entry.sites - 1) >= entry.sigma**2 and entry.colluders == 1 for entry in own)
        keys = [(entry.run, entry.round, entry.attempt) for entry in own]
        assert len(set(keys)) == len(keys)
    assert {entry.roster for entry in entries["north"]} <= {e.roster for name in ("east", "south") for e in entries[name]}
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    assert summary["rounds"] == 3 and summary["seeded"] is False and summary["colluders"] == 1 and summary["repeats"] >= 1
    alone = [SampledGaussian(entry.share, entry.q, 1) for entry in entries["north"]]
    assert summary["epsilon_alone"] >= epsilon_spent(alone, 1e-4) - 1e-9
    assert summary["epsilon"] < summary["epsilon_alone"]
    assert entries["north"][-1].epsilon < entries["north"][-1].alone_epsilon
