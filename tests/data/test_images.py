"""Images of a table, prepared when they are needed; one that cannot be read contributes nothing."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pil
from torch import Tensor

from lalora_flwr.data.images import CACHE_BYTES, ImageRecords, Room
from tests.data.files import picture, png, red, write_images


def records(
    values: Sequence[Any], kind: Any = None, mode: str = "RGB", prepare: Any = red, room: int = CACHE_BYTES
) -> ImageRecords:
    table = Dataset.from_dict({"image": list(values)}, Features({"image": kind or Image()}))
    return ImageRecords(table, "image", torch.arange(len(values)) + 10, prepare, mode, Room(room))


def batch(held: ImageRecords, *indices: int) -> tuple[list[float], list[int]]:
    inputs, labels = held.batch(torch.tensor(indices, dtype=torch.long))
    return inputs.flatten().tolist(), labels.tolist()


def test_images_come_as_bytes_or_paths(tmp_path: Path) -> None:
    write_images(tmp_path, ["0.png", "1.png", "2.png"])
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for values, kind in (
        ([png(i) for i in range(3)], Value("binary")),
        ([{"bytes": png(i), "path": None} for i in range(3)], Image()),
        ([{"bytes": None, "path": path} for path in paths], Image()),
        (paths, Image()),
        (paths, Value("string")),
    ):
        held = records(values, kind)
        assert len(held) == 3 and batch(held, 2, 0) == ([2.0, 0.0], [12, 10])


def unreadable(folder: Path) -> list[Any]:
    (folder / "text.png").write_text("no image")
    (folder / "folder.png").mkdir()
    return [
        {"bytes": b"", "path": None},
        {"bytes": png(1)[:-30], "path": None},
        {"bytes": b"garbled", "path": None},
        {"bytes": None, "path": str(folder / "gone.png")},
        {"bytes": None, "path": str(folder / "text.png")},
        {"bytes": None, "path": str(folder / "folder.png")},
    ]


def test_an_unreadable_image_counts_and_contributes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = unreadable(tmp_path)
    held = records([{"bytes": png(7), "path": None}, *bad, {"bytes": png(8), "path": None}])
    with caplog.at_level(logging.WARNING):
        everything = range(len(bad) + 2)
        assert len(held) == len(everything)
        assert batch(held, *everything) == ([7.0, 8.0], [10, 11 + len(bad)])
    assert {record.name for record in caplog.records} == {"lalora_flwr.site"}
    assert f"{tmp_path}" in caplog.text  # the owner's log names the file
    inputs, labels = held.batch(torch.arange(1, 1 + len(bad)))
    assert len(inputs) == len(labels) == 0
    assert torch.cat(held.parts(torch.arange(len(held)), 2)).tolist() == list(everything)


def test_an_image_that_cannot_be_prepared_contributes_nothing() -> None:
    def prepare(image: Pil.Image) -> Tensor:
        if red(image) == 1:
            raise ValueError("too small")
        return red(image)

    assert batch(records([picture(0), picture(1), picture(2)], prepare=prepare), 0, 1, 2) == ([0.0, 2.0], [10, 12])


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("own", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_every_kind_of_image_becomes_the_models(mode: str, own: str) -> None:
    seen: list[str] = []

    def prepare(image: Pil.Image) -> Tensor:
        seen.append(image.mode)
        return torch.zeros(1)

    assert len(batch(records([picture(5).convert(own)], Image(), mode, prepare), 0)[0]) == 1
    assert seen == [mode]


def test_a_turned_photograph_is_set_upright(tmp_path: Path) -> None:
    exif = Pil.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    picture(5).save(tmp_path / "a.jpg", exif=exif)
    sizes: list[tuple[int, int]] = []
    held = records([str(tmp_path / "a.jpg")], prepare=lambda image: sizes.append(image.size) or torch.zeros(1))
    held.batch(torch.tensor([0]))
    assert sizes == [(3, 4)]


@pytest.mark.parametrize("room", [0, 4, 8, 1000])
def test_what_fits_is_kept_and_the_rest_is_read_again(room: int) -> None:
    reads: list[float] = []
    held = records(
        [picture(i) for i in range(3)], prepare=lambda image: (reads.append(float(red(image))), red(image))[1], room=room
    )
    for _ in range(2):
        assert batch(held, 0, 1, 2) == ([0.0, 1.0, 2.0], [10, 11, 12])
    kept = min(3, room // 4)
    assert reads == [0.0, 1.0, 2.0, *[float(i) for i in range(kept, 3)]]


def test_sets_share_their_room_and_give_it_back() -> None:
    room, table = Room(8), Dataset.from_dict({"image": [picture(i) for i in range(3)]}, Features({"image": Image()}))
    one, two = (ImageRecords(table, "image", torch.arange(3), red, "RGB", room) for _ in range(2))
    assert batch(one, 0)[0] == batch(two, 0)[0] and room.left == 0
    assert batch(two, 1)[0] == [1.0] and room.left == 0
    del one
    gc.collect()
    assert room.left == 4
    assert batch(two, 1)[0] == [1.0] and room.left == 0


@pytest.mark.parametrize("most", [0, 1, 2, 9])
def test_parts_are_the_batch(most: int) -> None:
    parts = records([picture(i) for i in range(4)]).parts(torch.tensor([3, 0, 2]), most)
    assert torch.cat(parts).tolist() == [3, 0, 2] and all(len(part) <= (most or 3) for part in parts)


def test_no_image_is_read_before_it_is_needed(tmp_path: Path) -> None:
    write_images(tmp_path, ["0.png", "1.png"])
    held = records([str(tmp_path / f"{i}.png") for i in range(2)])
    (tmp_path / "1.png").write_bytes(png(9))
    assert batch(held, 1) == ([9.0], [11])


def test_an_image_whose_file_was_written_since_is_read_again(tmp_path: Path) -> None:
    write_images(tmp_path, ["0.png", "1.png"])
    held = records([str(tmp_path / f"{i}.png") for i in range(2)], room=8)
    assert batch(held, 0, 1) == ([0.0, 1.0], [10, 11])
    (tmp_path / "1.png").write_bytes(png(9))
    assert batch(held, 0, 1) == ([0.0, 9.0], [10, 11])
    (tmp_path / "1.png").unlink()
    assert batch(held, 0, 1) == ([0.0], [10])
    write_images(tmp_path, ["1.png"])
    assert batch(held, 0, 1) == ([0.0, 0.0], [10, 11])


def test_no_record_at_all() -> None:
    held = records([])
    assert len(held) == 0 and batch(held) == ([], [])
