"""Scikit-learn's handwritten digits as a small domain-shift task that needs no download.

Source: ``sklearn.datasets.load_digits``, 1797 grey images of 8x8 pixels with values 0..16 and 10 classes. A fixed
permutation cuts them into three disjoint parts. The public part stays upright and is all that the embedded model was
pretrained on. The private and the test part are turned clockwise by 45 degrees: a model that only knows upright digits
fails on most of them, so what a federated run gains on the test part was learnt from the private records.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lalora_flwr.data.named import NamedDataSet
from lalora_flwr.data.records import Records
from lalora_flwr.ground.extras import need

IMAGE_SIZE = 8
NUM_CLASSES = 10
PUBLIC_RECORDS = 400
PRIVATE_RECORDS = 1100
TEST_RECORDS = 297
BACKGROUND = -1.0  # a pixel of value 0 after scaling

_PIXEL_MAX = 16.0  # the data set's documented range, so scaling looks at no record
_SPLIT_SEED = 20240
_TILT_DEGREES = 45.0


def all_records() -> tuple[Tensor, Tensor]:
    """Upright images (1797, 1, 8, 8) scaled to [-1, 1] and labels (1797,), in the fixed permuted order.

    Raises:
        ConfigError: scikit-learn, which holds them, is not installed.
    """
    need("sklearn", "data.name = 'digits'")
    rows = table()
    order = np.random.RandomState(_SPLIT_SEED).permutation(PUBLIC_RECORDS + PRIVATE_RECORDS + TEST_RECORDS)
    images = rows[order, :-1].reshape(-1, IMAGE_SIZE, IMAGE_SIZE).astype(np.float32) / (_PIXEL_MAX / 2) - 1.0
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(rows[order, -1].astype(np.int64))


def table() -> NDArray[np.float64]:
    """What ``load_digits`` reads, (1797, 65): the pixels of an image row by row, then its class.

    From scikit-learn's own file: importing the library for it takes longer than a round, in each process of a simulation.
    """
    found = find_spec("sklearn")
    file = Path(found.origin if found and found.origin else "").parent / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():
        return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Resample each image through its own affine map; what comes from outside the image is background.

    Args:
        images: (n, 1, 8, 8) in [-1, 1].
        matrices: (n, 2, 3), output to input coordinates as in ``torch.nn.functional.affine_grid``.

    Returns:
        Images (n, 1, 8, 8) in [-1, 1], bilinear.
    """
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    # grid_sample fills with zeros, so the background is moved there and back
    return F.grid_sample(images - BACKGROUND, grid, align_corners=False) + BACKGROUND


def tilted(images: Tensor) -> Tensor:
    """The images (n, 1, 8, 8) turned clockwise about their centre by 45 degrees."""
    angle = math.radians(_TILT_DEGREES)
    cos, sin = math.cos(angle), math.sin(angle)
    return warp(images, torch.tensor([[cos, sin, 0.0], [-sin, cos, 0.0]]).expand(len(images), 2, 3))


def upright(start: int, count: int) -> tuple[Tensor, Tensor]:
    """``count`` upright records from a place in the fixed order on."""
    images, labels = all_records()
    return images[start : start + count], labels[start : start + count]


def public_part() -> tuple[Tensor, Tensor]:
    """Upright public records: images float32 (400, 1, 8, 8) in [-1, 1], labels int64 (400,)."""
    return upright(0, PUBLIC_RECORDS)


def private_part() -> tuple[Tensor, Tensor]:
    """Tilted private training records: images float32 (1100, 1, 8, 8) in [-1, 1], labels int64 (1100,)."""
    images, labels = upright(PUBLIC_RECORDS, PRIVATE_RECORDS)
    return tilted(images), labels


def test_part() -> tuple[Tensor, Tensor]:
    """Tilted test records: images float32 (297, 1, 8, 8) in [-1, 1], labels int64 (297,)."""
    images, labels = upright(PUBLIC_RECORDS + PRIVATE_RECORDS, TEST_RECORDS)
    return tilted(images), labels


DIGITS = NamedDataSet(
    task="image",
    labels=tuple(str(digit) for digit in range(NUM_CLASSES)),
    records=PRIVATE_RECORDS,
    license="CC BY 4.0 (UCI Machine Learning Repository, Optical Recognition of Handwritten Digits)",
    private=lambda: Records(*private_part()),
    public=lambda: Records(*test_part()),
    input_shape=(1, IMAGE_SIZE, IMAGE_SIZE),
    mixed=True,
)
