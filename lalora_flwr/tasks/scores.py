"""Scores of classification, as scikit-learn defines them; a site and a server need no more of it."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def confusion(targets: Tensor, guesses: Tensor, classes: int) -> NDArray[np.int64]:
    """How many records of each class (rows) were taken for each class (columns).

    Args:
        targets: int64 (n,), from 0 to ``classes`` - 1.
        guesses: the same.
    """
    pairs = targets.cpu() * classes + guesses.cpu()
    return torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes).numpy()


def f1_of_classes(counts: NDArray[np.int64]) -> list[float]:
    """F1 of each class from the confusion matrix (classes, classes); 0 for one with neither records nor guesses."""
    found, both = counts.diagonal(), counts.sum(0) + counts.sum(1)
    return [2 * int(right) / int(all_) if all_ else 0.0 for right, all_ in zip(found, both, strict=True)]


def f1(truth: NDArray[np.bool_], guesses: NDArray[np.bool_]) -> float:
    """F1 of one class from its records and its guesses, (n,) each; 0 if there are neither."""
    both = int(truth.sum()) + int(guesses.sum())
    return 2 * int((truth & guesses).sum()) / both if both else 0.0


def matthews(counts: NDArray[np.int64]) -> float:
    """Matthews' correlation from the confusion matrix; 0 where all records or all guesses are of one class."""
    true, guessed = ([int(value) for value in counts.sum(axis)] for axis in (1, 0))  # Python's integers do not overflow
    n = sum(true)

    def spread(one: list[int], other: list[int], matched: int) -> int:
        return n * matched - sum(a * b for a, b in zip(one, other, strict=True))

    scale = spread(true, true, n) * spread(guessed, guessed, n)
    return spread(true, guessed, int(counts.trace())) / math.sqrt(scale) if scale else 0.0


def area_under_roc(truth: NDArray[np.bool_], scores: NDArray[np.floating]) -> float:
    """How likely a record of the class has a higher score than one of the others, where ties count half.

    Args:
        truth: (n,), at least one of each kind.
        scores: (n,), finite.
    """
    from scipy.stats import rankdata  # slow to import

    inside = int(truth.sum())
    above = float(rankdata(scores)[truth].sum()) - inside * (inside + 1) / 2
    return above / (inside * (len(truth) - inside))
