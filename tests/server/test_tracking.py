"""Those who follow a run: told what lies in its folder, in order, and unable to end it, hold it up or change it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lalora_flwr.engines.inline import run_inline
from lalora_flwr.ground.errors import ConfigError, RunFailed
from lalora_flwr.server.metrics import RoundMetrics, Summary
from lalora_flwr.server.trackers.tracker import config_of
from lalora_flwr.server.tracking import Tracking, check_trackers, dropped, trackers_of
from lalora_flwr.settings import Settings, settings_from
from tests.conftest import MODELS, Finished, files_in, small, strict_json


class Noting:
    """Keeps all it is told; ``fails_at`` and ``waits_at`` are names of calls."""

    def __init__(self, fails_at: str = "", waits_at: str = "") -> None:
        self.told: list[Any] = []
        self.threads: set[int] = set()
        self._fails_at, self._waits_at = fails_at, waits_at
        self.go_on = threading.Event()

    def _hear(self, call: str, *what: Any) -> None:
        self.threads.add(threading.get_ident())
        if call == self._waits_at:
            self.go_on.wait()
        if call == self._fails_at:
            raise SystemExit("the library gave up\nfor several reasons")
        self.told.append((call, *what))

    def start(self, settings: Settings, folder: Path) -> None:
        self._hear("start", settings, folder)

    def round(self, metrics: RoundMetrics) -> None:
        self._hear("round", metrics)

    def finish(self, summary: Summary | None) -> None:
        self._hear("finish", summary)


def run(folder: Path, tracker: Any, on_round: Any = None, **overrides: Any) -> Path:
    return run_inline(small(folder, **overrides), on_round, models=MODELS, trackers={"noting": tracker})


def adapter_of(folder: Path) -> bytes:
    return files_in(folder)["adapter/adapter_model.safetensors"]


def test_a_tracker_is_told_what_the_folder_holds_and_nothing_else(tmp_path: Path) -> None:
    noting = Noting()
    folder = run(tmp_path, noting)
    settings, at = noting.told[0][1:]
    assert [call for call, *_ in noting.told] == ["start", "round", "round", "finish"]
    assert (settings, at) == (small(tmp_path), folder)
    lines = [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [what.to_json() for call, what in noting.told[1:-1]] == lines
    assert noting.told[-1][1] == Summary.from_json(strict_json((folder / "summary.json").read_text()))
    assert len(noting.threads) == 1 and threading.get_ident() not in noting.threads
    assert strict_json((folder / "tracking.json").read_text()) == {"noting": {"round": 2}} and not dropped(folder)


def test_a_run_without_trackers_leaves_no_note(finished: Callable[..., Finished]) -> None:
    assert not [name for name in files_in(finished().path) if "track" in name]


@pytest.mark.parametrize("call", ["start", "round", "finish"])
def test_a_tracker_that_fails_is_dropped_with_one_warning(call: str, tmp_path: Path, finished: Callable[..., Finished]) -> None:
    noting = Noting(fails_at=call)
    folder = run(tmp_path, noting)
    assert adapter_of(folder) == adapter_of(finished().path)
    assert not [one for one, *_ in noting.told if one not in ("start", "round")]
    warnings = [line for line in (folder / "flower.log").read_text().splitlines() if "tracker noting" in line]
    assert len(warnings) == 1 and "SystemExit: the library gave up; the run goes on without it" in warnings[0]
    assert dropped(folder) == {"noting": "SystemExit: the library gave up"}


def test_a_tracker_that_hangs_holds_nothing_up(tmp_path: Path) -> None:
    noting = Noting(waits_at="round")
    tracking = Tracking({"noting": noting}, small(tmp_path), tmp_path, patience=0.2)
    tracking.rounds([RoundMetrics(round=1)])
    tracking.finish(Summary(rounds=1))
    assert dropped(tmp_path) == {"noting": "it did not come to an end"}
    noting.go_on.set()


def test_a_run_that_stops_is_finished_without_a_summary(tmp_path: Path) -> None:
    noting = Noting()

    def stop(_: RoundMetrics) -> None:
        raise RunFailed("stopped by the test")

    with pytest.raises(RunFailed):
        run(tmp_path, noting, stop)
    assert [call for call, *_ in noting.told] == ["start", "round", "finish"] and noting.told[-1][1] is None


class Killed(BaseException):
    """Ends a run where it is."""


def kill(line: RoundMetrics) -> None:
    if line.round == 2:
        raise Killed


def test_after_a_resume_a_tracker_goes_on_with_the_rounds_that_it_lacks(tmp_path: Path) -> None:
    first, second = Noting(), Noting()
    with pytest.raises(Killed):
        run(tmp_path, first, kill, num_rounds=3)
    run(tmp_path, second, num_rounds=3, resume=True)
    assert [what.round for call, what in first.told[1:] if call == "round"] == [1, 2]
    assert [what.round for call, what in second.told[1:] if call == "round"] == [3]
    assert second.told[0][1].resume and second.told[-1][1].rounds == 3


def test_a_tracker_that_was_dropped_gets_the_rounds_that_it_missed(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, Noting(fails_at="round"), kill, num_rounds=3)
    assert dropped(tmp_path / "run")
    second = Noting()
    folder = run(tmp_path, second, num_rounds=3, resume=True)
    assert [what.round for call, what in second.told[1:] if call == "round"] == [1, 2, 3] and not dropped(folder)


def test_other_trackers_may_follow_when_a_run_goes_on(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run_inline(small(tmp_path, num_rounds=3), kill, models=MODELS)
    late = Noting()
    run(tmp_path, late, num_rounds=3, resume=True, track="tensorboard")
    assert [what.round for call, what in late.told[1:] if call == "round"] == [1, 2, 3]


def test_what_trackers_send_of_the_settings_names_no_place(tmp_path: Path) -> None:
    shown = config_of(small(tmp_path, privacy__epsilon=float("inf")))
    assert shown["privacy.epsilon"] == "inf" and shown["strategy"] == "la-lora"
    assert str(tmp_path) not in str(shown) and not {"output-dir", "run-name", "track", "metrics-file"} & set(shown)


def named(track: str) -> Settings:
    return settings_from({"track": track})


def test_a_missing_library_is_one_line_that_says_how_to_install_it() -> None:
    with pytest.raises(ConfigError) as caught:
        check_trackers(named("tensorboard,mlflow"), installed=lambda name: name != "mlflow")
    assert str(caught.value) == "track = 'mlflow': mlflow is not installed; pip install \"lalora-flwr[tracking]\""
    check_trackers(named("tensorboard, mlflow"), installed=lambda name: True)


@pytest.mark.parametrize("track", ["a,,b", ",", "wandb,wandb", "a, a"])
def test_a_list_that_is_none_is_refused(track: str) -> None:
    with pytest.raises(ConfigError, match=r"^track = .*: must be names with commas between, each once$"):
        named(track)


def test_an_unknown_tracker_is_refused_by_the_server_and_not_by_a_site() -> None:
    settings = named("tensorbord")  # what a site does with a run's settings
    with pytest.raises(ConfigError, match=r"^track = 'tensorbord': must be one of .*; did you mean tensorboard\?$"):
        trackers_of(settings)


PACKAGE = """
class Mine:
    def start(self, settings, folder): self.path = folder / "mine"
    def round(self, metrics): self.path.open("a").write(f"{metrics.round} {metrics.epsilon:.3f}\\n")
    def finish(self, summary): self.path.open("a").write("end\\n")

class Half:
    def start(self, settings, folder): pass

class Broken(Mine):
    def __init__(self): raise RuntimeError("no licence")
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with trackers, found as an installed one is."""
    folder = tmp_path / "site-packages"
    (folder / "mine-1.0.dist-info").mkdir(parents=True)
    (folder / "mine_trackers.py").write_text(PACKAGE)
    (folder / "mine-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    points = "[lalora.trackers]\nmine = mine_trackers:Mine\nhalf = mine_trackers:Half\nbroken = mine_trackers:Broken\n"
    (folder / "mine-1.0.dist-info" / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "mine_trackers", raising=False)
    return folder


@pytest.mark.usefixtures("installed")
def test_the_tracker_of_another_package_is_chosen_by_its_name(tmp_path: Path) -> None:
    folder = run_inline(small(tmp_path, track="mine"), models=MODELS)
    lines = [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (folder / "mine").read_text().splitlines() == [*(f"{one['round']} {one['epsilon']:.3f}" for one in lines), "end"]


@pytest.mark.usefixtures("installed")
def test_a_tracker_that_cannot_be_made_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="track = 'half': a tracker has start, round and finish"):
        run_inline(small(tmp_path, track="half"), models=MODELS)
    with pytest.raises(ConfigError, match=r"^track = 'broken': cannot be made: RuntimeError: no licence$"):
        run_inline(small(tmp_path, track="broken"), models=MODELS)
    assert not (tmp_path / "run").exists()
