"""Scores against scikit-learn's, with ties, absent classes and one-sided guesses."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, f1_score, matthews_corrcoef, roc_auc_score

from lalora_flwr.tasks.scores import area_under_roc, confusion, f1, f1_of_classes, matthews

CLASSES = 4
SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=20)
PAIRS = st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), min_size=1, max_size=40)


@given(pairs=PAIRS)
def test_of_several_classes(pairs: list[tuple[int, int]]) -> None:
    truth, guesses = (list(values) for values in zip(*pairs, strict=True))
    counts = confusion(torch.tensor(truth), torch.tensor(guesses), CLASSES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that all are of one class
        assert (counts == confusion_matrix(truth, guesses, labels=range(CLASSES))).all()
        each = f1_score(truth, guesses, labels=range(CLASSES), average=None, zero_division=0)
        assert f1_of_classes(counts) == pytest.approx(list(each), abs=1e-12)
        assert matthews(counts) == pytest.approx(matthews_corrcoef(truth, guesses), abs=1e-12)


@given(pairs=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_of_one_class(pairs: list[tuple[bool, bool]]) -> None:
    truth, guesses = (np.array(values) for values in zip(*pairs, strict=True))
    assert f1(truth, guesses) == pytest.approx(f1_score(truth, guesses, zero_division=0), abs=1e-12)


@given(inside=SCORES, outside=SCORES)
def test_the_area_counts_ties_half(inside: list[int], outside: list[int]) -> None:
    truth = np.array([True] * len(inside) + [False] * len(outside))
    scores = np.array([*inside, *outside], dtype=np.float32)
    assert area_under_roc(truth, scores) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)


def test_large_counts_do_not_overflow() -> None:
    counts = np.array([[3, 1], [2, 4]], dtype=np.int64)
    assert matthews(counts * 10**9) == pytest.approx(matthews(counts), rel=1e-12)
