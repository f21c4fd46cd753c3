"""What is kept, and what makes it stale."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lalora_flwr.ground.cache import Cache, stamp, stamp_below


def test_a_value_is_made_once_until_others_were_used_since() -> None:
    made: list[str] = []
    cache: Cache[str, str] = Cache(2)

    def get(key: str) -> str:
        def make() -> str:
            made.append(key)
            return key.upper()

        return cache.get(key, make)

    assert [get(key) for key in ("a", "b", "a", "c", "a", "b")] == ["A", "B", "A", "C", "A", "B"]
    assert made == ["a", "b", "c", "b"] and len(cache) == 2


def test_what_is_kept_weighs_no_more_than_the_size() -> None:
    made: list[int] = []
    cache: Cache[int, bytes] = Cache(10, len)

    def get(length: int) -> bytes:
        def make() -> bytes:
            made.append(length)
            return bytes(length)

        return cache.get(length, make)

    assert [len(get(length)) for length in (4, 5, 4, 1, 6, 4, 6)] == [4, 5, 4, 1, 6, 4, 6]
    assert made == [4, 5, 1, 6, 4] and len(cache) == 2  # 5 went for 6 and 4 with it; 1 went for 4
    get(11)
    assert len(cache) == 0  # what is larger than all of it drives out the rest and is not kept


def test_of_size_0_keeps_nothing() -> None:
    cache: Cache[int, list[int]] = Cache(0)
    assert cache.get(1, list) is not cache.get(1, list) and len(cache) == 0


def test_what_cannot_be_made_is_not_kept() -> None:
    cache: Cache[int, int] = Cache(2)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            cache.get(1, lambda: 1 // 0)
    assert cache.get(1, lambda: 5) == 5


def test_a_stamp_changes_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a"
    stamps = [stamp(file)]
    file.write_text("one")
    times = file.stat()
    stamps.append(stamp(file))
    file.write_text("two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    stamps.append(stamp(file))
    (tmp_path / "b").write_text("two")
    (tmp_path / "b").replace(file)
    stamps.append(stamp(file))
    assert len(set(stamps)) == 4 and stamp(file) == stamps[-1]


def test_a_stamp_of_a_folder_changes_with_its_names(tmp_path: Path) -> None:
    before = stamp(tmp_path)
    (tmp_path / "a").write_text("x")
    assert stamp(tmp_path) != before


@pytest.mark.parametrize("pattern", ["{}", "{}/a/b.csv", "{}/**/*.csv"])
def test_a_stamp_of_all_below_changes_with_each_file(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "b.csv"
    file.write_text("x")
    before = stamp_below(pattern.format(tmp_path))
    assert len(before) == 1 and stamp_below(pattern.format(tmp_path)) == before
    file.write_text("y")
    assert stamp_below(pattern.format(tmp_path)) != before
    file.unlink()
    assert not stamp_below(pattern.format(tmp_path))


def test_a_path_that_cannot_be_has_a_stamp() -> None:
    assert stamp(Path("a\0b")) == stamp(Path("a\0b")) != stamp(Path("c\0d"))
