"""Files written whole or not at all, and locks between processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lalora_flwr.ground.files import PUBLIC, files_below, is_locked, lock, replace_file
from tests.conftest import files_in


class Crash(BaseException):
    """The end of the process, as far as the code under test can tell."""


def crash(*_: Any, **__: Any) -> Any:
    raise Crash


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_content(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, fresh = tmp_path / "metrics.jsonl", tmp_path / "summary.json"
    replace_file(path, "old\n")
    with monkeypatch.context() as crashing:
        crashing.setattr(*((os, "fsync", crash) if moment == "fsync" else (Path, "replace", crash)))
        for target in (path, fresh):
            with pytest.raises(Crash):
                replace_file(target, "new\n" * 10_000)
    assert path.read_text() == "old\n" and not fresh.exists()
    replace_file(path, b"newer\n")
    assert path.read_text() == "newer\n"


def test_what_is_replaced_into_place_is_complete_and_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync, replace = os.fsync, Path.replace

    def seen_replace(self: Path, target: Any) -> Path:
        assert synced and self.read_bytes() == b"x" * 100 and self.parent == Path(target).parent
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), fsync(fd)))
    monkeypatch.setattr(Path, "replace", seen_replace)
    replace_file(tmp_path / "file", b"x" * 100)
    assert synced[0] == 100 and len(synced) == 2  # the file before its name, the folder after it
    assert files_in(tmp_path) == {"file": b"x" * 100}


def test_text_is_written_as_utf_8(tmp_path: Path) -> None:
    replace_file(tmp_path / "file", "ε ≤ 8")
    assert (tmp_path / "file").read_bytes() == "ε ≤ 8".encode()


def test_only_the_owner_reads_it_unless_it_is_public(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        replace_file(tmp_path / "own", "x")
        replace_file(tmp_path / "public", "x", mode=PUBLIC)
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("own", "public")] == [0o600, 0o644]


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError):
        replace_file(tmp_path / "file", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_another_process_finds_a_lock_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    ask = "import sys, pathlib, lalora_flwr.ground.files as files; print(files.is_locked(pathlib.Path(sys.argv[1])))"

    def asked() -> str:
        return subprocess.run([sys.executable, "-c", ask, str(path)], capture_output=True, text=True, check=True).stdout.strip()

    assert not is_locked(path) and not path.exists()
    with lock(path):
        assert asked() == "True"
        with pytest.raises(BlockingIOError):
            lock(path)
    assert asked() == "False"


def test_files_behind_linked_folders_are_below_too_and_loops_end(tmp_path: Path) -> None:
    elsewhere, data = tmp_path / "elsewhere", tmp_path / "data"
    (elsewhere / "deep").mkdir(parents=True)
    (data / "own").mkdir(parents=True)
    for file in (elsewhere / "deep" / "a", elsewhere / "b", data / "own" / "c", data / ".hidden"):
        file.write_text("x")
    (data / "linked").symlink_to(elsewhere)
    (data / "nothing").symlink_to(tmp_path / "gone")
    (elsewhere / "back").symlink_to(data)
    names = {str(file.relative_to(data)) for file in files_below(str(data))}
    assert names == {".hidden", "nothing", "own/c", "linked/b", "linked/deep/a"}
    assert files_below(str(data / "own" / "*")) == [data / "own" / "c"] and files_below(str(data / "none")) == []
