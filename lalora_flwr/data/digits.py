"""Scikit-learn's handwritten digits as a small domain-shift task that needs no download.

Source: ``sklearn.datasets.load_digits``, 1797 grey images of 8x8 pixels with values 0..16 and 10 classes. A fixed
permutation cuts them into three disjoint parts. The public part stays upright and is all that the embedded model was
pretrained on. The private and the test part are turned by 90 degrees: a model that only knows upright digits fails on
them, so what a federated run gains on the test part was learnt from the private records.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

IMAGE_SIZE = 8
NUM_CLASSES = 10
PUBLIC_RECORDS = 400
PRIVATE_RECORDS = 1100
TEST_RECORDS = 297

_PIXEL_MAX = 16.0  # the data set's documented range, so scaling looks at no record
_SPLIT_SEED = 20240


@lru_cache(maxsize=1)
def _all_records() -> tuple[np.ndarray, np.ndarray]:
    """Upright images (1797, 8, 8) scaled to [-1, 1] and labels (1797,), in the fixed permuted order."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.RandomState(_SPLIT_SEED).permutation(PUBLIC_RECORDS + PRIVATE_RECORDS + TEST_RECORDS)
    images = digits.images[order].astype(np.float32) / (_PIXEL_MAX / 2) - 1.0
    return images, digits.target[order].astype(np.int64)


def _part(start: int, count: int, quarter_turns: int) -> tuple[Tensor, Tensor]:
    images, labels = _all_records()
    stop = start + count
    turned = np.rot90(images[start:stop], k=quarter_turns, axes=(1, 2))
    return torch.from_numpy(turned.copy()).unsqueeze(1), torch.from_numpy(labels[start:stop].copy())


def public_part() -> tuple[Tensor, Tensor]:
    """Upright public records: images float32 (400, 1, 8, 8) in [-1, 1], labels int64 (400,)."""
    return _part(0, PUBLIC_RECORDS, quarter_turns=0)


def private_part() -> tuple[Tensor, Tensor]:
    """Private training records, turned by 90 degrees: images float32 (1100, 1, 8, 8) in [-1, 1], labels int64 (1100,)."""
    return _part(PUBLIC_RECORDS, PRIVATE_RECORDS, quarter_turns=1)


def test_part() -> tuple[Tensor, Tensor]:
    """Test records, turned by 90 degrees: images float32 (297, 1, 8, 8) in [-1, 1], labels int64 (297,)."""
    return _part(PUBLIC_RECORDS + PRIVATE_RECORDS, TEST_RECORDS, quarter_turns=1)
