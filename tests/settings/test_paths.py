"""Names of files and folders mean the same wherever a process works."""

from __future__ import annotations

from pathlib import Path

import pytest

from lalora_flwr.ground.errors import ConfigError, SiteRefusal
from lalora_flwr.ledger.caps import caps_from
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.server.place import folder_for
from lalora_flwr.settings import settings_from
from lalora_flwr.settings.paths import with_absolute_paths
from tests.ledger.test_caps import LABELS, NEEDED


def test_files_and_folders_become_absolute_and_hub_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    values = {"data.name": "file:part/*.csv", "data.test": "file:test.csv", "output-dir": "out", "model.name": "hf/model"}
    settings = with_absolute_paths(settings_from(values))
    assert settings.model.name == f"hf/{tmp_path}/model" and settings.output_dir == f"{tmp_path}/out"
    assert (settings.data.name, settings.data.test) == (f"file:{tmp_path}/part/*.csv", f"file:{tmp_path}/test.csv")
    assert with_absolute_paths(settings) == settings
    hub = settings_from({"data.name": "hub:glue/sst2", "model.name": "hf/org/model", "output-dir": str(tmp_path)})
    assert with_absolute_paths(hub) == hub


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    settings = with_absolute_paths(
        settings_from({"data.name": "file:~/a.csv", "model.name": "timm/~/model", "output-dir": "~/out"})
    )
    assert (settings.data.name, settings.model.name) == (f"file:{tmp_path}/a.csv", f"timm/{tmp_path}/model")
    assert settings.output_dir == f"{tmp_path}/out"
    assert folder_for(settings_from({"output-dir": "~/out", "run-name": "a"})) == tmp_path / "out" / "a"


def test_a_user_that_nobody_knows_is_one_line() -> None:
    with pytest.raises(ConfigError, match="~nobody-here has no home folder"):
        with_absolute_paths(settings_from({"metrics-file": "~nobody-here/a.prom"}))
    with pytest.raises(ConfigError, match="~nobody-here has no home folder"):
        LedgerFile(Path("~nobody-here/ledger.db"))


@pytest.mark.parametrize("key", ["ledger-path", "witness-path", "data-path", "model-path"])
def test_so_is_it_in_a_node_config(key: str) -> None:
    with pytest.raises(SiteRefusal, match=f"^node-config: {key} must be a path; its user has no home folder here$"):
        caps_from({**NEEDED, **LABELS, key: "~nobody-here/x"}, needed=True)


def test_the_file_for_prometheus_is_where_the_command_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert with_absolute_paths(settings_from({"metrics-file": "a.prom"})).metrics_file == f"{tmp_path}/a.prom"
    assert with_absolute_paths(settings_from({})).metrics_file == ""
