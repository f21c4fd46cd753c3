"""Test records from files are never the private ones, whatever the two settings call them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lalora_flwr.data.data_set import data_set
from lalora_flwr.ground.errors import ConfigError
from tests.data.files import column, keep, settings, write_csv, write_images

REFUSED = r"^data\.test = .*: these are the private records; take hold-out:0\.1 of them$"


def tables(folder: Path, *names: str) -> Path:
    for name in names:
        write_csv(folder / f"{name}.csv", [(f"{name} 1", "good"), (f"{name} 2", "bad")])
    return folder


def public(name: Path | str, test: Path | str) -> list[str]:
    return column(data_set(settings(name=f"file:{name}", test=f"file:{test}")).public(keep))


@pytest.mark.parametrize("other", ["{0}/train.csv", "{0}/../own/train.csv", "{0}", "{0}/", "{0}/*.csv", "{1}/link.csv", "{1}/*"])
@pytest.mark.parametrize("swapped", [False, True])
def test_another_name_of_the_private_files_is_refused(tmp_path: Path, other: str, swapped: bool) -> None:
    own = tables(tmp_path / "own", "train")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "link.csv").symlink_to(own / "train.csv")
    names = [str(own / "train.csv"), other.format(own, tmp_path / "links")]
    with pytest.raises(ConfigError, match=REFUSED):
        public(*reversed(names) if swapped else names)


def test_one_private_file_among_others_is_enough(tmp_path: Path) -> None:
    own = tables(tmp_path / "own", "a", "b")
    with pytest.raises(ConfigError, match=REFUSED):
        public(own / "a.csv", own / "*.csv")
    assert public(own / "a.csv", own / "b.csv") == ["b 1", "b 2"]


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("train", "test", "dev"), "test"),
        (("train", "dev"), "dev"),
        (("train", "validation"), "validation"),
        (("train",), "train"),
    ],
)
def test_of_a_folder_the_test_records_are_taken_if_it_says_which(tmp_path: Path, names: tuple[str, ...], taken: str) -> None:
    own, other = tables(tmp_path / "own", "train"), tables(tmp_path / "other", *names)
    assert public(own, other) == [f"{taken} 1", f"{taken} 2"]


def test_the_folder_of_the_private_records_may_hold_public_ones(tmp_path: Path) -> None:
    own = tables(tmp_path / "own", "train", "validation")
    assert public(own, own) == public(own / "train.csv", own) == ["validation 1", "validation 2"]


def test_image_folders_too(tmp_path: Path) -> None:
    own = write_images(tmp_path / "own", ["train/cat/0.png", "train/dog/1.png", "test/cat/2.png", "test/dog/3.png"])
    (tmp_path / "link").symlink_to(own / "train")
    wanted = settings("image", name=f"file:{own}", test=f"file:{own}")
    assert len(data_set(wanted).public(keep)) == 2
    for name, test in ((own, own / "train"), (own, tmp_path / "link"), (own / "train", tmp_path / "link")):
        with pytest.raises(ConfigError, match=REFUSED):
            data_set(settings("image", name=f"file:{name}", test=f"file:{test}")).public(keep)


def test_paths_in_a_table_of_test_images_start_where_that_table_is(tmp_path: Path) -> None:
    for folder in ("own", "public"):
        write_images(tmp_path / folder, ["images/0.png"])
        write_csv(tmp_path / folder / "t.csv", [("images/0.png", "cat"), ("images/0.png", "dog")], names="file_name,label")
    wanted = settings("image", name=f"file:{tmp_path / 'own'}", test=f"file:{tmp_path / 'public' / 't.csv'}")
    assert column(data_set(wanted).public(keep), "file_name") == 2 * [f"{tmp_path}/public/images/0.png"]
    assert column(data_set(wanted).private([0], keep), "file_name") == [f"{tmp_path}/own/images/0.png"]
