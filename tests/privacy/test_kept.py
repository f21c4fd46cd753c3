"""Calibrated noise on disk: faster, and never weaker."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lalora_flwr.privacy.accounting import CALIBRATIONS, epsilon_spent, noise_multiplier_for
from lalora_flwr.privacy.events import SampledGaussian
from lalora_flwr.privacy.kept import CACHE, FILE, Calibrations, cache_folder, made_by

QUESTION = (2.0, 1e-5, 0.05, 70, "pld", ())


def calibrated() -> float:
    """As a new process would: nothing is in memory."""
    noise_multiplier_for.cache_clear()
    return noise_multiplier_for(*QUESTION)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    CALIBRATIONS.open(tmp_path / "cache")
    yield tmp_path / "cache"
    CALIBRATIONS.open(None)
    noise_multiplier_for.cache_clear()


def test_what_was_searched_for_once_is_found_and_is_the_same(folder: Path) -> None:
    first = calibrated()
    assert CALIBRATIONS.get(QUESTION) == first
    assert calibrated() == first
    assert (folder / FILE).stat().st_mode & 0o077 == 0
    other = Calibrations()
    assert other.get(QUESTION) is None  # nobody opened it
    other.open(folder)
    assert other.get(QUESTION) == first and other.get((3.0, *QUESTION[1:])) is None


@pytest.mark.parametrize("wrong", [0.01, 1e-300, 0.0, -1.0, 1e9, float("inf")])
def test_a_wrong_value_weakens_nothing(folder: Path, wrong: float) -> None:
    right = calibrated()
    CALIBRATIONS.put(QUESTION, wrong)
    assert calibrated() == right == CALIBRATIONS.get(QUESTION)
    CALIBRATIONS.put(QUESTION, right * 0.99)  # too little noise by one percent
    found = calibrated()
    assert epsilon_spent([SampledGaussian(found, 0.05, 70)], 1e-5) <= 2.0 and found == right


def test_a_damaged_file_is_made_anew(folder: Path) -> None:
    first = calibrated()
    for content in (b"", b"no database, whatever its name says" * 40):
        (folder / FILE).write_bytes(content)
        assert CALIBRATIONS.get(QUESTION) is None and calibrated() == first == CALIBRATIONS.get(QUESTION)
    (folder / FILE).unlink()
    with sqlite3.connect(folder / FILE) as store:
        store.execute("CREATE TABLE kept (name TEXT PRIMARY KEY, sigma TEXT)")
    (folder / FILE).chmod(0o600)
    assert calibrated() == first


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_what_others_can_write_is_left_alone(folder: Path, mode: int) -> None:
    first = calibrated()
    (folder / FILE).chmod(mode)
    before = (folder / FILE).read_bytes()
    CALIBRATIONS.put(QUESTION, 99.0)
    assert CALIBRATIONS.get(QUESTION) is None and calibrated() == first and (folder / FILE).read_bytes() == before
    (folder / FILE).chmod(0o600)
    folder.chmod(0o777)
    assert CALIBRATIONS.get(QUESTION) is None


def test_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"")
    (folder / FILE).symlink_to(tmp_path / "elsewhere")
    calibrated()
    assert CALIBRATIONS.get(QUESTION) is None and (tmp_path / "elsewhere").read_bytes() == b""


def test_a_file_that_cannot_be_opened_is_none(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    kept = Calibrations()
    kept.open(tmp_path)
    kept.put(QUESTION, 1.0)
    assert kept.get(QUESTION) is None


def test_a_folder_that_cannot_be_made_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    kept = Calibrations()
    kept.open(tmp_path / "file" / "cache")
    kept.put(QUESTION, 1.0)
    assert kept.get(QUESTION) is None


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lalora-flwr"
    monkeypatch.setenv(CACHE, "")
    assert cache_folder() is None
    monkeypatch.setenv(CACHE, "~/kept")
    assert cache_folder() == Path.home() / "kept"
    assert len(made_by()) == 4 and all(made_by())


def test_a_real_sites_process_reads_no_calibration() -> None:
    """Whatever it imports for its work, nothing opens the store; only the engines of simulations do."""
    code = (
        "import lalora_flwr.client_app, lalora_flwr.site.round, lalora_flwr.site.resident.trainer\n"
        "from lalora_flwr.client_app import host\n"
        "from lalora_flwr.privacy.accounting import CALIBRATIONS\n"
        "assert not host().simulated and CALIBRATIONS._file is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, CACHE: "/nonexistent"})
    root = Path(__file__).parents[2] / "lalora_flwr"
    opening = {str(path.relative_to(root)) for path in root.rglob("*.py") if "CALIBRATIONS.open(" in path.read_text()}
    assert opening == {"engines/inline.py", "engines/ray_main.py"}
