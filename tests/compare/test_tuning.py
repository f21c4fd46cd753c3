"""The tuned winner, from accuracies made by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lalora_flwr.compare.cells import Tuned
from lalora_flwr.compare.tuning import WORST, choose, mean_score

AXES = {"train.lr": (0.1, 0.3, 1.0)}


def at(lr: float) -> Tuned:
    return (("train.lr", lr),)


def test_the_highest_mean_wins_not_the_highest_run() -> None:
    choice = choose({at(0.1): [0.5, 0.9], at(0.3): [0.75, 0.75], at(1.0): [0.2, 0.95]}, AXES)
    assert choice.winner == at(0.3) and not choice.edge
    assert choice.means == {at(0.1): pytest.approx(0.7), at(0.3): 0.75, at(1.0): pytest.approx(0.575)}


@pytest.mark.parametrize("order", [(0.1, 0.3, 1.0), (1.0, 0.3, 0.1)])
def test_of_equal_values_the_smaller_wins(order: tuple[float, ...]) -> None:
    scores = {0.1: [0.5], 0.3: [0.75], 1.0: [0.75]}
    assert choose({at(lr): scores[lr] for lr in order}, AXES).winner == at(0.3)


@pytest.mark.parametrize(("best", "edge"), [(0.1, True), (0.3, False), (1.0, True)])
def test_a_winner_at_the_edge_is_flagged(best: float, edge: bool) -> None:
    assert choose({at(lr): [0.8 if lr == best else 0.5] for lr in (0.1, 0.3, 1.0)}, AXES).edge is edge


def test_a_grid_of_one_value_or_of_words_has_no_edge() -> None:
    assert not choose({at(0.1): [0.5]}, {"train.lr": (0.1,)}).edge
    words = {"filter.name": ("none", "gauss5")}
    assert not choose({(("filter.name", word),): [0.5] for word in words["filter.name"]}, words).edge


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_a_value_with_a_failed_run_is_worse_than_any_other(bad: float | None) -> None:
    choice = choose({at(0.1): [0.99, bad], at(0.3): [0.0, 0.0], at(1.0): []}, AXES)
    assert choice.winner == at(0.3)
    assert choice.means[at(0.1)] == choice.means[at(1.0)] == WORST


def test_without_a_finished_value_nobody_wins() -> None:
    choice = choose({at(0.1): [None], at(0.3): [None]}, AXES)
    assert choice.winner is None and not choice.edge


def test_two_tuned_keys_are_chosen_together() -> None:
    axes = {"train.lr": (0.1, 1.0), "privacy.clip-norm": (1.0, 2.0, 4.0)}
    scores = {(("train.lr", a), ("privacy.clip-norm", b)): [0.5] for a in axes["train.lr"] for b in axes["privacy.clip-norm"]}
    scores[("train.lr", 1.0), ("privacy.clip-norm", 2.0)] = [0.9]
    choice = choose(scores, axes)
    assert choice.winner == (("train.lr", 1.0), ("privacy.clip-norm", 2.0)) and choice.edge


@given(st.lists(st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=3), min_size=3, max_size=3))
def test_the_winner_is_never_beaten(runs: list[list[float | None]]) -> None:
    scores = dict(zip(map(at, AXES["train.lr"]), runs, strict=True))
    winner = choose(scores, AXES).winner
    means = {tuned: mean_score(accuracies) for tuned, accuracies in scores.items()}
    assert (winner is None) == (max(means.values()) == WORST)
    if winner:
        assert means[winner] == max(means.values())
        assert winner == next(tuned for tuned in map(at, AXES["train.lr"]) if means[tuned] == means[winner])
