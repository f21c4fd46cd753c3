"""Images of a table, read when they are needed."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from io import BytesIO
from typing import Any

import torch
from datasets import Dataset, Image
from PIL import Image as Pil
from PIL import ImageOps
from torch import Tensor

# Of pictures, and of nothing that Pillow would hand to another program (EPS runs PostScript) or read from other files
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
log = logging.getLogger("lalora_flwr.site")
CACHE_BYTES = 1 << 30  # of prepared images a set keeps; what does not fit is read again


class ImageRecords:
    """Images (n, channels, height, width), prepared as the model wants them, and labels (n,).

    An image that cannot be read is left out of its batches: it contributes nothing to a step, as a record whose gradient
    is not finite. Its place in the count stays, so that nothing about it shows.
    """

    def __init__(self, table: Dataset, column: str, labels: Tensor, prepare: Callable[[Pil.Image], Tensor], mode: str) -> None:
        """
        Args:
            table: the rows.
            column: the images, of type ``Image`` or paths of files.
            labels: the class of each row.
            prepare: the model's own resizing and normalisation.
            mode: ``RGB`` or ``L``.
        """
        self._files = table.select_columns([column]).cast_column(column, Image(decode=False))
        self._column, self.labels, self._prepare, self._mode = column, labels, prepare, mode
        self._kept: dict[int, Tensor | None] = {}
        self._room = CACHE_BYTES

    def __len__(self) -> int:
        return len(self.labels)

    def parts(self, indices: Tensor, most: int) -> list[Tensor]:
        return list(indices.split(most or max(1, len(indices))))

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images = [self._image(i) for i in indices.tolist()]
        read = [i for i, image in enumerate(images) if image is not None]
        if not read:
            return torch.empty(0), self.labels[:0]
        return torch.stack([images[i] for i in read]), self.labels[indices[read]]  # type: ignore[misc]

    def _image(self, index: int) -> Tensor | None:
        if index in self._kept:
            return self._kept[index]
        file = self._files[index][self._column]
        try:
            with Pil.open(_opened(file), formats=FORMATS) as picture:
                image: Tensor | None = self._prepare(ImageOps.exif_transpose(picture).convert(self._mode))
        except Exception:  # truncated, no image at all, gone: PIL and its plug-ins raise many types
            log.warning("an image cannot be read and is left out of every batch")
            image = None
        size = 0 if image is None else image.numel() * image.element_size()
        if size <= self._room:
            self._room -= size
            self._kept[index] = image
        return image


def _opened(file: dict[str, Any]) -> BytesIO | str:
    """A picture's bytes, or its path if it is a file: a pipe or a device would let a reader wait for ever."""
    if file["bytes"] is not None:
        return BytesIO(file["bytes"])
    if not stat.S_ISREG(os.stat(file["path"]).st_mode):
        raise OSError(f"{file['path']}: no file")
    return str(file["path"])
