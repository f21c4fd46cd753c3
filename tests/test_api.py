"""The package from Python."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lalora_flwr import api
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.server.folder import to_json
from lalora_flwr.server.metrics import RoundMetrics
from tests.conftest import SMALL

ROOT = Path(__file__).parents[1]
KEYS: dict[str, Any] = {key.replace("-", "_").replace(".", "__"): value for key, value in SMALL.items()}


def test_importing_it_loads_neither_torch_nor_flower() -> None:
    code = "import sys, lalora_flwr.api; print([name for name in ('torch', 'flwr', 'ray', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_its_plan_audit_and_certificate(tmp_path: Path) -> None:
    wanted = api.settings(**KEYS, output_dir=str(tmp_path), run_name="mine")
    planned = api.plan(wanted)
    told: list[RoundMetrics] = []
    result = api.run(wanted, on_round=told.append)
    assert result.path == tmp_path / "mine" and result.settings == wanted
    assert [to_json(line.to_json()) for line in result.metrics] == [to_json(line.to_json()) for line in told]
    assert result.summary.noise_multiplier == pytest.approx(planned.mechanism.noise_multiplier, rel=1e-9)
    assert api.opened(result.path) == api.opened(str(result.path)) == result
    assert any("follows from their steps" in line for line in api.verify(str(result.path)))
    assert api.audit(wanted).survived


def test_the_readmes_lines_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (lines,) = [block for block in blocks if "lalora_flwr.api" in block]
    done = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    sigma, result = done.stdout.splitlines()
    epsilon, adapter = result.split()
    assert float(sigma) > 0 and 0 < float(epsilon) <= 3 and (tmp_path / adapter / "adapter_model.safetensors").exists()


def test_settings_come_from_a_file_and_from_names(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text('strategy = "ffa-lora"\n[train]\nlr = 0.25\n')
    assert api.settings(str(tmp_path / "my.toml")).strategy == "ffa-lora"
    found = api.settings(tmp_path / "my.toml", num_rounds=3, train__lr=0.5)
    assert (found.strategy, found.num_rounds, found.train.lr) == ("ffa-lora", 3, 0.5)
    with pytest.raises(ConfigError, match=r"privacy\.epsilonn"):
        api.settings(privacy__epsilonn=1.0)


def test_runs_side_by_side(tmp_path: Path) -> None:
    base = {**SMALL, "num-rounds": 1, "train.local-steps": 1, "privacy.epsilon": float("inf")}
    del base["strategy"]
    rows = api.compare({"strategy": ["ffa-lora", "dp-lora"]}, tmp_path / "out", base, workers=1)
    assert sorted(row.method for row in rows) == ["dp-lora", "ffa-lora"] and all(row.summary for row in rows)
    assert json.loads((rows[0].path / "summary.json").read_text())["private"] is False


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda folder: api.run(api.settings(), engine="cloud"), "engine = 'cloud': must be one of inline, ray"),
        (lambda folder: api.opened(folder), "holds no finished run"),
        (lambda folder: api.align(api.settings(), folder / "none.txt", folder / "start"), "none.txt: cannot be read"),
        (lambda folder: api.compare({}, folder), "nothing to compare"),
        (lambda folder: api.compare({"seed": [0]}, folder, {"seed": 1}), "name it in one place"),
        (lambda folder: api.compare({"strategy": "la-lora"}, folder), "^strategy: must be a list of values"),
        (lambda folder: api.compare({"seed": [0]}, folder, tune={"filter.name": "none"}), r"^filter\.name: must be a list of"),
        (lambda folder: api.compare({"seed": [0]}, folder, workers=-1), "workers = -1: must be 0 or more"),
        (lambda folder: api.run(api.settings(), engine="ray", num_actors=-1), "num_actors = -1: must be 0 or more"),
        (lambda folder: api.membership(api.settings(), workers=-1), "workers = -1: must be 0 or more"),
        (lambda folder: api.membership(str(folder)), "no run's folder"),
        (lambda folder: api.verify(str(folder)), r"holds no privacy\.json"),
    ],
)
def test_wrong_input(call: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=match):
        call(tmp_path)


def test_a_word_for_the_log_that_nobody_knows_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LALORA_LOG", "xml")
    with pytest.raises(ConfigError, match=r"^LALORA_LOG = 'xml': must be json, or not set$"):
        api.run(api.settings(**KEYS, output_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())
