"""How the content of a picture file becomes an image with eight bits a channel."""

from __future__ import annotations

import numpy as np
from PIL import Image as Pil
from PIL import ImageOps

DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of one channel with more than eight bits


def as_shown(picture: Pil.Image, mode: str) -> Pil.Image:
    """The picture upright and in ``mode`` (``RGB`` or ``L``).

    Of a file with several pages or frames it is the first. The orientation that EXIF names is applied. One channel of 16 or 32
    bits or of floats (radiographs, microscopes) is scaled from the picture's own smallest value, black, to its own largest,
    white: files say nowhere which range their values have. Values that are not finite are black. Transparency is dropped.
    Nothing depends on other pictures.
    """
    upright = ImageOps.exif_transpose(picture)
    return (_scaled(upright) if upright.mode in DEEP else upright).convert(mode)


def _scaled(picture: Pil.Image) -> Pil.Image:
    values = np.asarray(picture, dtype=np.float64)
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    span = (high - low) or 1.0
    scaled = np.where(finite, (np.where(finite, values, low) - low) / span, 0.0)
    return Pil.fromarray(np.round(255 * scaled).astype(np.uint8), "L")
