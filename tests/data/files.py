"""Small real files of records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from lalora_flwr.data.cleaning import Rows
from lalora_flwr.data.records import RecordSet
from lalora_flwr.settings import DataSettings, Settings, settings_from


class Kept:
    """Rows as they come, for a model's records."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def parts(self, indices: Tensor, most: int) -> list[Tensor]:
        raise NotImplementedError


def keep(rows: Rows) -> RecordSet:
    return Kept(rows)


def rows_of(records: RecordSet) -> Rows:
    assert isinstance(records, Kept)
    return records.rows


def column(records: RecordSet, name: str = "text") -> list[Any]:
    return list(rows_of(records).table[name])


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def write_csv(path: Path, rows: Iterable[tuple[str, ...]], names: str = "text,label") -> Path:
    return write(path, "".join(f"{line}\n" for line in [names, *(",".join(row) for row in rows)]))


def picture(colour: int) -> Image.Image:
    return Image.new("RGB", (4, 3), (colour, 0, 0))


def png(colour: int) -> bytes:
    made = BytesIO()
    picture(colour).save(made, "png")
    return made.getvalue()


def write_images(folder: Path, names: Sequence[str]) -> Path:
    """One image a name, such as ``cat/1.png``; the n-th has red n."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return folder


def red(image: Image.Image) -> Tensor:
    """A preparation: the image's red."""
    pixel = image.convert("RGB").getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return torch.tensor([float(pixel[0])])


def settings(task: str = "text", **data: Any) -> Settings:
    model = {"image": "timm/x", "text": "hf/x", "language": "hf/x"}[task]
    return settings_from({"model.name": model, **{f"data.{key.replace('_', '-')}": value for key, value in data.items()}})


def data_settings(**data: Any) -> DataSettings:
    return DataSettings(**data)


def table(**columns: list[Any]) -> Dataset:
    return Dataset.from_dict(columns)
