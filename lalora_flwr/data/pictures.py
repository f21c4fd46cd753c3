"""How the content of a picture file becomes an image with eight bits a channel."""

from __future__ import annotations

import numpy as np
from PIL import Image as Pil
from PIL import ImageOps

AT_ONCE = 1 << 20  # pixels
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
    """Some rows at a time: in float64 a whole picture could take more memory than a site has."""
    values = np.asarray(picture)
    rows = max(1, AT_ONCE // max(1, values.shape[1]))
    bands = [slice(start, start + rows) for start in range(0, len(values), rows)]
    ends = [(float(known.min()), float(known.max())) for band in bands if (known := values[band][np.isfinite(values[band])]).size]
    low, high = min((low for low, _ in ends), default=0.0), max((high for _, high in ends), default=0.0)
    shown = np.zeros(values.shape, np.uint8)
    for band in bands:
        finite = np.isfinite(values[band])
        shown[band][finite] = np.round(255 * ((values[band][finite].astype(np.float64) - low) / ((high - low) or 1.0)))
    return Pil.fromarray(shown, "L")
