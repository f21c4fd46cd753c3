"""Several views of each image, whose gradients are averaged before the clip (augmentation multiplicity, arXiv 2204.13650)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

REACH = 8  # an image moves by at most 1 / REACH of its side in each direction


def views(images: Tensor, seeds: Tensor, count: int, *, flips: bool) -> Tensor:
    """Shifted, and if asked for mirrored, copies of images.

    Guarantee: the views of an image follow from the image, its own seed and public constants, so that the mean gradient over
    them is a function of this record alone, and clipping it bounds what the record adds as ever.

    Args:
        images: (records, channels, height, width).
        seeds: one independent uniform draw from [0, 1) per record, float64.
        count: views of each.
        flips: whether half of them are mirrored left to right.

    Returns:
        (records · count, channels, height, width), the views of a record one after the other. What moves in from outside repeats
        the edge.
    """
    height, width = images.shape[-2:]
    most = height // REACH, width // REACH
    padded = nn.functional.pad(images, (most[1], most[1], most[0], most[0]), mode="replicate")
    out = []
    for image, seed in zip(padded, seeds.tolist(), strict=True):
        draw = np.random.default_rng(int(seed * 2**53))
        tops, lefts = (draw.integers(0, 2 * reach + 1, count) for reach in most)
        mirrored = draw.random(count) < 0.5 if flips else np.zeros(count, dtype=bool)
        for top, left, turn in zip(tops.tolist(), lefts.tolist(), mirrored.tolist(), strict=True):
            view = image[..., top : top + height, left : left + width]
            out.append(view.flip(-1) if turn else view)
    return torch.stack(out)


def mean_of_views(gradients: Tensor, count: int) -> Tensor:
    """Per-view gradients (records · count, *shape) as means over each record's views, (records, *shape)."""
    return gradients.reshape(-1, count, *gradients.shape[1:]).mean(1)
