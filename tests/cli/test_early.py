"""What needs neither torch nor data is refused first, in one line, and leaves nothing behind."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lalora_flwr.cli.compare import _print_dropped
from lalora_flwr.cli.early import check_machine, check_output, check_places, without_hub
from lalora_flwr.cli.plan import _reads_data
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.server.folder import RunFolder
from lalora_flwr.settings import settings_from
from tests.cli.commands import pairs, without_waiting
from tests.conftest import files_in, small

SETTINGS = "run --engine inline -c"


def lalora(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lalora_flwr", *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "80", **env},
        capture_output=True,
        text=True,
    )


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in without_waiting(done.stderr).splitlines() if not line.startswith("import time:")]


def imported(done: subprocess.CompletedProcess[str], name: str) -> bool:
    return any(line.rpartition("|")[2].strip() == name for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("merge.name=foo", "lalora: merge.name = 'foo': must be one of"),
        ("filter.name=foo", "lalora: filter.name = 'foo': must be one of"),
        ("lora.rank=2 lora.rank=3", "lalora: -c lora.rank: named twice"),
        ("train.num-threads=999", "lalora: train.num-threads = 999: this machine has"),
        ("output-dir=taken/x", "lalora: output-dir = 'taken/x': "),
        ("output-dir=~nobody-here/x", "lalora: '~nobody-here/x': ~nobody-here has no home folder"),
        ("metrics-file=gone/a.prom", "lalora: metrics-file = 'gone/a.prom': must be a file in a folder that exists"),
        ("metrics-file=out", "lalora: metrics-file = 'out': must be a file"),
        ("metrics-file=~nobody-here/a.prom", "lalora: '~nobody-here/a.prom': ~nobody-here has no home folder"),
        ("train.optimizer=adamw train.momentum=0.5", "lalora: train.momentum = 0.5: "),
        ("lora.start-from=gone", "lalora: lora.start-from = 'gone': no such folder"),
        ("lora.start-from=.", "lalora: lora.start-from = "),
        ("run-name=taken output-dir=.", "lalora: run-name = 'taken': "),
        (f"run-name={'é' * 101}", f"lalora: run-name = {'é' * 101!r}: must be a name of at most 200 bytes"),
        ("run-name=a\x01b", r"lalora: run-name = 'a\x01b': must be a name of at most 200 bytes without slashes and control"),
        ("run-name=there output-dir=out", "lalora: run-name = 'there': "),
        ("model.name=hf/x data.name=file:gone.csv", "lalora: data.name = 'gone.csv': no such file or folder"),
        ("model.name=hf/x data.name=file:taken data.test=file:go*.csv", "lalora: data.test = 'go*.csv': no such file or folder"),
        ("model.name=hf/out data.name=file:taken", "lalora: model.name = 'hf/out': a folder needs config.json"),
        ("model.name=hf/./gone data.name=file:taken", "lalora: model.name = 'hf/./gone': no such folder"),
        ("model.name=timm/a/gone data.name=file:taken", "lalora: model.name = 'timm/a/gone': timm has no such model"),
    ],
)
def test_a_mistake_is_one_line_before_torch_is_imported(settings: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with RunFolder(small(tmp_path / "out", run_name="there")):
        pass
    before = files_in(tmp_path)
    done = lalora(tmp_path, "run", "-c", settings)
    (line,) = said(done)
    assert done.returncode == 2 and line.startswith(reason) and not imported(done, "torch")
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    ("data", "refused"),
    [({"data.labels": "a,b", "data.records": 100}, False), ({"data.labels": "a,b"}, True), ({"data.records": 100}, True)],
    ids=str,
)
def test_a_plan_looks_for_the_files_that_it_has_to_read(data: dict[str, Any], refused: bool) -> None:
    settings = settings_from({"model.name": "hf/x", "data.name": "file:gone.csv", **data})
    assert _reads_data(settings) == refused
    check_places(settings, data=False)
    with pytest.raises(ConfigError, match="no such file or folder"):
        check_places(settings)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("-c", "train.num-threads=999"), "lalora: train.num-threads = 999: this machine has"),
        (("--over", "merge.name=mean,foo"), "lalora: merge.name = 'foo': must be one of"),
        (("--out", "taken/x"), "lalora: --out taken/x: "),
        (("-c", "track=tensorbord"), "lalora: track = 'tensorbord': must be one of"),
    ],
    ids=["machine", "names", "place", "trackers"],
)
def test_so_is_a_comparisons(arguments: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    done = lalora(tmp_path, "compare", "--over", "strategy=la-lora,dp-lora", *arguments)
    (line,) = said(done)
    assert done.returncode == 2 and line.startswith(reason) and not imported(done, "torch")
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    "command", ["run --resume out/run", "compare --over strategy=la-lora,dp-lora", "site start -- --superlink x:1 --insecure"]
)
def test_a_word_for_the_log_that_nobody_knows_is_refused_before_torch(command: str, tmp_path: Path) -> None:
    with RunFolder(small(tmp_path / "out")) as folder:
        assert folder.path == tmp_path / "out" / "run"
    done = lalora(tmp_path, *command.split(), LALORA_LOG="xml")
    assert said(done) == ["lalora: LALORA_LOG = 'xml': must be json, or not set"] and not imported(done, "torch")
    assert done.returncode == 2  # with which systemd does not start a site again


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["keys"], ["ledger", "--help"], ["certs", "--help"]])
def test_what_only_answers_imports_no_torch(arguments: list[str], tmp_path: Path) -> None:
    done = lalora(tmp_path, *arguments)
    assert done.returncode == 0 and done.stdout and not imported(done, "torch") and not imported(done, "transformers")


def test_the_same_key_in_two_options_is_refused_and_in_a_file_overridden(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[lora]\nrank = 0\n")
    (line,) = said(lalora(tmp_path, "run", "-c", "seed=1", "-c", "seed=2"))
    assert line == "lalora: -c seed: named twice"
    (line,) = said(lalora(tmp_path, "run", "--config", "run.toml"))
    assert line.startswith("lalora: lora.rank = 0")
    (line,) = said(lalora(tmp_path, "run", "--config", "run.toml", "-c", "lora.rank=2 merge.name=x"))
    assert line.startswith("lalora: merge.name")


@pytest.mark.parametrize("overrides", [{"train__device": "cuda"}, {"train__num_gpus": 0.5}])
def test_a_gpu_where_there_is_none_is_refused(overrides: dict[str, Any], tmp_path: Path) -> None:
    settings = small(tmp_path, **overrides)
    with pytest.raises(ConfigError, match=r"^train\.(device = 'cuda'|num-gpus = 0\.5): this machine has no GPU$"):
        check_machine(settings, gpu_devices=(str(tmp_path / "none"),))
    check_machine(settings, gpu_devices=(str(tmp_path),))
    check_machine(small(tmp_path), gpu_devices=())


@pytest.mark.parametrize("overrides", [{"model__dtype": "nf4"}, {"profiles": "batch=2;batch=3 precision=nf4;"}])
def test_four_bits_without_their_library_are_refused(overrides: dict[str, Any], tmp_path: Path) -> None:
    settings = small(tmp_path, **overrides)
    line = r"^model\.dtype = 'nf4': needs bitsandbytes; pip install \"lalora-flwr\[4bit\]\"; model\.dtype = 'bfloat16' works"
    with pytest.raises(ConfigError, match=line):
        check_machine(settings, find=lambda module: None)
    check_machine(settings)
    check_machine(small(tmp_path), find=lambda module: None)


def test_a_place_for_results_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    check_output(small(tmp_path / "a" / "b"))
    assert not list(tmp_path.iterdir())


def test_only_a_hub_out_of_reach_that_is_needed_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    asked: list[bool] = []

    def reach(answer: bool) -> Any:
        return lambda: (asked.append(answer), answer)[1]

    of_hub = small(tmp_path, model__name="hf/nobody/nothing", data__name="hub:nobody/nothing")
    assert not without_hub(small(tmp_path), reach(False)) and not asked
    assert not without_hub(of_hub, reach(True)) and asked and "HF_HUB_OFFLINE" not in os.environ
    with pytest.raises(ConfigError, match="the hub cannot be reached and its cache holds no nobody/nothing; put"):
        without_hub(of_hub, reach(False))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert without_hub(of_hub, reach(False), weights=False)  # some models can be planned without
    assert not without_hub(of_hub, reach(False)) and len(asked) == 3
    (tmp_path / "model").mkdir()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    local = small(tmp_path, model__name=f"hf/{tmp_path / 'model'}", data__name=f"file:{tmp_path}")
    assert not without_hub(local, reach(False)) and len(asked) == 3


@pytest.mark.parametrize("name", ["/tmp/nosuch", "./nosuch", "models/my/nosuch"])
def test_a_folder_that_is_not_there_is_no_repository(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    of_hub = small(tmp_path, model__name=f"hf/{name}", data__name="hub:nobody/nothing")
    with pytest.raises(ConfigError, match=f"^model.name = 'hf/{name}': no such folder, and no name of a repository$"):
        without_hub(of_hub, lambda: False)


def test_a_model_in_the_hubs_cache_needs_no_hub(tmp_path: Path) -> None:
    """In a process of its own, as Hugging Face's library reads its environment when it is imported."""
    home, commit = tmp_path / "models--nobody--nothing", "a" * 40
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    ask = (
        "import os\nfrom lalora_flwr.cli.early import without_hub\nfrom tests.conftest import small\n"
        "os.environ.pop('HF_HUB_OFFLINE', None)\n"  # which the tests set
        "of_hub = small('.', model__name='hf/nobody/nothing', data__name='hub:nobody/nothing')\n"
        "print(without_hub(of_hub, lambda: False), os.environ['HF_HUB_OFFLINE'])"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path)}
    asked = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True)
    assert asked.stdout == "True 1\n", asked.stderr


SPELT = "epsilon <= 4 at delta"


@pytest.mark.parametrize(("encoding", "words"), [("ascii", SPELT), ("cp1252", SPELT), ("utf-8", "ε ≤ 4 at δ")])
def test_any_encoding_of_the_output_works(encoding: str, words: str, tmp_path: Path) -> None:
    env = {**os.environ, "COLUMNS": "80", "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-m", "lalora_flwr", "plan", "-c", pairs(privacy__accountant="rdp")],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        encoding=encoding,
    )
    assert done.returncode == 0 and words in done.stdout and not without_waiting(done.stderr)


def test_the_help_shows_the_parts_of_a_grid_file(tmp_path: Path) -> None:
    text = " ".join(lalora(tmp_path, "compare", "--help").stdout.replace("│", " ").split())
    assert "TOML file with config, [set], [over], [tune] and [tuning]." in text


def test_a_comparison_names_the_trackers_that_its_runs_went_on_without(tmp_path: Path) -> None:
    for name, content in (("a", {}), ("b", {"mlflow": {"dropped": "locked [x]"}}), ("c", {"mlflow": {"dropped": "gone"}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tracking.json").write_text(json.dumps(content))
    (tmp_path / "mlflow.db").write_text("beside the runs")
    said = Console(file=io.StringIO(), width=200)
    _print_dropped(tmp_path, said)
    assert said.file.getvalue() == "runs that went on without their tracker mlflow: 2, the first b: locked [x]\n"  # type: ignore[attr-defined]
