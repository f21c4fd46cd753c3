"""Resident trainers of a real federation: they serve, they are killed, and they end with their site."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from flwr.app import ArrayRecord, Message

from lalora_flwr.ledger.entries import Reserve
from lalora_flwr.site.bundle import read_bundle
from lalora_flwr.site.resident.hand_over import BOOT
from tests.deployment.drill import Drill
from tests.deployment.federation import ROOT, SITE_START, Federation
from tests.deployment.processes import lives, wait_for
from tests.deployment.recorder import Recorded, Recorder, Sent
from tests.deployment.texts import save_texts, text_run

SERVES = "serves this site's messages"  # in a site's log, once for each trainer


def trainers(federation: Federation, name: str) -> list[psutil.Process]:
    """The living trainers of a site: they leave the tree of its processes, and keep its FLWR_HOME."""
    found = []
    for process in federation._marked():
        with suppress(psutil.Error):
            own = process.environ()["FLWR_HOME"] == federation.environment(name)["FLWR_HOME"]
            if own and BOOT.name in " ".join(process.cmdline()) and "resident" in " ".join(process.cmdline()):
                found.append(process)
    return found


def form(reply: Message) -> list[tuple[str, list[tuple[str, object]]]]:
    """All of a reply but the numbers that noise decides: records and keys in their order, types and shapes, counters."""
    shown = []
    for name, record in reply.content.items():
        arrays = isinstance(record, ArrayRecord)
        shown.append((name, [(key, (v.dtype, v.shape, v.stype) if arrays else v) for key, v in record.items()]))
    return shown


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_a_site_with_a_trainer_answers_as_one_without(tmp_path: Path) -> None:
    """Both sites run approved code, and one of them keeps a trainer, for two rounds of a run. It ends with its site."""
    records = {name: save_texts(tmp_path / f"{name}.csv", 60, seed=1) for name in ("keeps", "forgets")}
    approved = {"approved-code": read_bundle(ROOT).digest, "device": "cpu"}
    with Recorded(tmp_path) as federation, Recorder(federation) as recorder:
        federation.proxy = recorder.port
        federation.start_superlink()
        federation.add_sites(records, approved, own={"forgets": {"resident-seconds": 0}}, start=SITE_START)
        run = federation.submit(text_run(tmp_path))
        assert federation.wait(run) == "finished:completed", federation.logs(run)
        said = {name: federation.process(name).said() for name in records}
        (trainer,) = trainers(federation, "keeps")
        assert not trainers(federation, "forgets")
        federation.process("keeps").kill()
        wait_for("the trainer's end", lambda: not lives(trainer), patience=20)
        replies = [reply for reply in Sent(recorder.sent).replies() if reply.metadata.message_type == "train"]
    assert said["keeps"].count(SERVES) == 1 and SERVES not in said["forgets"]
    for words in ("reserved 2 steps", "took 2 of 2 reserved steps", "approved-code: the app bundle"):
        assert said["keeps"].count(words) == said["forgets"].count(words) > 0, said
    sites = {reply.metadata.src_node_id for reply in replies}
    forms = [[form(reply) for reply in replies if reply.metadata.src_node_id == site] for site in sites]
    assert [len(found) for found in forms] == [2, 2] and sorted(map(str, forms[0])) == sorted(map(str, forms[1]))
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    assert summary["failures"] == 0 and summary["rounds"] == 2 and summary["seeded"] is False


@pytest.mark.faults
def test_trainers_are_killed_at_random_moments(tmp_path: Path) -> None:
    """One site's trainer dies idle, before, within and after its reservations; the other's is spared."""
    with Federation(tmp_path) as federation:
        drill = Drill(federation, tmp_path, seed=5)
        federation.start_superlink()
        drill.add_sites("north", "east")
        run = federation.submit(drill.run_config(num_rounds=5, max_failures=1))
        for stage in ("reserved", "process", "committed", "before"):
            if not drill.at("east", stage, drill.ended):
                break
            for trainer in trainers(federation, "east"):
                trainer.kill()
                drill.kills.append(f"east: trainer, {stage}")
            done = drill.rounds()
            drill.until("the next round", lambda done=done: drill.rounds() > done or drill.ended())
        drill.until("the end", drill.ended)
        drill.report()
        assert federation.wait(run) == "finished:completed", federation.logs(run)
        drill.check()
        reserved = [entry for entry in drill.entries("east") if isinstance(entry, Reserve)]
        assert len(drill.kills) >= 2 and len(reserved) <= drill.rounds()  # nothing was served twice
        said = federation.process("east").said()
        lost = said.count("it took the message and did not answer")
        assert lost == sum(bool(line["failed_sites"]) for line in drill.lines()), said
        assert said.count(SERVES) > 1 and federation.process("north").said().count(SERVES) == 1
