"""Records with several classes, and with a number, on a real SuperLink: what the owner pins, what is trained, what is said."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lalora_flwr.cli.main import app
from tests.deployment.federation import Federation
from tests.deployment.texts import text_run

pytestmark = pytest.mark.slow

WORDS = ("actor", "story", "music")


def save(path: Path, count: int, seed: int, kind: str) -> Path:
    """JSON lines of sentences; a label is the list of what they praise, or how many of it."""
    chance = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            praised = [word for word in WORDS if chance.random() < 0.5]
            text = "the film is " + (" and ".join(f"good {word}" for word in praised) or "bad")
            file.write(json.dumps({"text": text, "label": praised if kind == "multi-label" else float(len(praised))}) + "\n")
    return path


KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "multi-label": ({"labels": ",".join(WORDS)}, "auroc"),
    "regression": ({"labels": None, "label-range": "0,3"}, "r2"),
}


@pytest.mark.parametrize("kind", ["multi-label", pytest.param("regression", marks=pytest.mark.nightly)])
def test_two_sites_train_on_their_own_labels(kind: str, tmp_path: Path) -> None:
    """With classes the run starts with a ridge head, at a rate by rule: two noises in one run of a real site's ledger."""
    pins, metric = KINDS[kind]
    first = {"lora__head": "ridge", "num_rounds": 3} if kind == "multi-label" else {}
    records = {name: save(tmp_path / f"{name}.jsonl", 60, seed, kind) for seed, name in enumerate(("north", "south"), 1)}
    wanted = text_run(
        tmp_path,
        data__labels=pins["labels"] or "",
        data__problem_type=kind,
        data__label_range=pins.get("label-range", ""),
        **first,
    )
    save(tmp_path / "public.jsonl", 40, 0, kind)
    wanted["data.test"] = f"file:{tmp_path / 'public.jsonl'}"
    with Federation(tmp_path) as federation:
        federation.start_superlink()
        columns = {"text-column": "text", "label-column": "label"}  # JSON lines have no header
        federation.add_sites(records, {"problem-type": kind, **pins, **columns, "device": "cpu"})
        run = federation.submit(wanted)
        assert federation.wait(run) == "finished:completed", federation.logs(run)
        for site in records:
            assert CliRunner().invoke(app, ["ledger", "verify", str(federation.ledger(site))]).exit_code == 0
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    assert math.isfinite(summary[metric]) and summary["test_records"] == 40 and summary["failures"] == 0
    assert 0 < summary["epsilon"] <= 4.0 and all(site["steps"] == (5 if first else 4) for site in summary["sites"].values())
    assert (tmp_path / "runs" / "run" / "plots" / f"{metric}.png").exists()
