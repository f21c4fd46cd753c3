"""Images of a table, read when they are needed."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import TypedDict

import torch
from datasets import Dataset, Image
from PIL import Image as Pil
from PIL import UnidentifiedImageError
from torch import Tensor

from lalora_flwr.data.pictures import as_shown
from lalora_flwr.data.records import in_parts
from lalora_flwr.ground.cache import Stamp, stamp

# Of pictures, and of nothing that Pillow would hand to another program (EPS runs PostScript) or read from other files
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
log = logging.getLogger("lalora_flwr.site")
CACHE_BYTES = 1 << 30  # of prepared images that a process keeps, of all its sites; what does not fit is read again


class Room:
    """Bytes that sets of images share."""

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, size: int) -> bool:
        """Whether there is room for so many bytes, which are then taken; negative ones are given back."""
        if size > self.left:
            return False
        self.left -= size
        return True


PREPARED = Room(CACHE_BYTES)  # of this process


class StoredImage(TypedDict):
    """A picture as a table holds it: its bytes, or the path of its file."""

    bytes: bytes | None
    path: str | None


class ImageRecords:
    """Images (n, channels, height, width), prepared as the model wants them, and labels (n,).

    An image that cannot be read is left out of its batches: it contributes nothing to a step, as a record whose gradient
    is not finite. Its place in the count stays, so that nothing about it shows. Prepared images are kept as far as there is
    room, each until its file changes.
    """

    def __init__(
        self,
        table: Dataset,
        column: str,
        labels: Tensor,
        prepare: Callable[[Pil.Image], Tensor],
        mode: str,
        room: Room = PREPARED,
    ) -> None:
        """
        Args:
            table: the rows.
            column: the images, of type ``Image`` or paths of files.
            labels: the class of each row.
            prepare: the model's own resizing and normalisation.
            mode: ``RGB`` or ``L``.
            room: for prepared images that are kept; the set gives back what it took when it is gone.
        """
        self._files = table.select_columns([column]).cast_column(column, Image(decode=False))
        self._column, self.labels, self._prepare, self._mode = column, labels, prepare, mode
        # By place in the table: the file, if it is one, its stamp, and the image; None if it could not be read.
        self._kept: dict[int, tuple[str | None, Stamp, Tensor | None]] = {}
        self._room, self._taken = room, 0

    def __del__(self) -> None:
        self._room.take(-self._taken)

    def __len__(self) -> int:
        return len(self.labels)

    def unreadable(self) -> int:
        """How many of the images that batches asked for could not be read."""
        return sum(image is None for _, _, image in self._kept.values())

    def parts(self, indices: Tensor, most: int) -> list[Tensor]:
        return in_parts(indices, most)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images = [(i, image) for i in indices.tolist() if (image := self._image(i)) is not None]
        if not images:
            return torch.empty(0), self.labels[:0]
        return torch.stack([image for _, image in images]), self.labels[[i for i, _ in images]]

    def _image(self, index: int) -> Tensor | None:
        if index in self._kept:
            path, version, image = self._kept[index]
            if version == _version(path):
                return image
            self._take(-_bytes(image))
            del self._kept[index]
        file: StoredImage = self._files[index][self._column]
        path = file["path"] if file["bytes"] is None else None
        version = _version(path)  # before it is read: what is written meanwhile is read again
        try:
            with Pil.open(_opened(file), formats=FORMATS) as picture:
                image = self._prepare(as_shown(picture, self._mode))
        except Exception as error:  # truncated, no image at all, gone: PIL and its plug-ins raise many types
            log.warning("%s cannot be read and is left out of every batch: %s", _called(path, index), _reason(error))
            image = None
        if self._take(_bytes(image)):
            self._kept[index] = path, version, image
        return image

    def _take(self, size: int) -> bool:
        fits = self._room.take(size)
        self._taken += size if fits else 0
        return fits


def unreadable(table: Dataset, column: str) -> Iterator[str]:
    """What each picture of a table is called that cannot be read, with the reason; reads them all."""
    files = table.select_columns([column]).cast_column(column, Image(decode=False))
    for index in range(len(files)):
        file: StoredImage = files[index][column]
        try:
            with Pil.open(_opened(file), formats=FORMATS) as picture:
                as_shown(picture, "L")
        except Exception as error:
            yield f"{_called(None if file['bytes'] is not None else file['path'], index)}: {_reason(error)}"


def _called(path: str | None, index: int) -> str:
    return path or f"the image of row {index}"


def _reason(error: Exception) -> str:
    """Without the names of Python's objects, and on one line."""
    if isinstance(error, UnidentifiedImageError):
        return f"not one of {', '.join(FORMATS)}"
    return " ".join(str(error).split()) or type(error).__name__


def _version(path: str | None) -> Stamp:
    return () if path is None else stamp(Path(path))


def _bytes(image: Tensor | None) -> int:
    return 0 if image is None else image.numel() * image.element_size()


def _opened(file: StoredImage) -> BytesIO | str:
    """A picture's bytes, or its path if it is a file: a pipe or a device would let a reader wait forever."""
    content, path = file["bytes"], file["path"]
    if content is not None:
        return BytesIO(content)
    if path is None or not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path}: no file")
    return path
