"""Batches of texts: cut where it is cheapest, padded without a trace."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lalora_flwr.data.records import Records, RecordSet, Subset
from lalora_flwr.data.texts import IGNORED, PART_COST, TextRecords, cheapest_cuts

PADDING = 9
LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=10).map(sorted)


def cost(lengths: Sequence[int], cuts: Sequence[int]) -> int:
    return sum((b - a) * lengths[b - 1] + PART_COST for a, b in itertools.pairwise(cuts))


def all_cuts(count: int, most: int) -> Iterator[list[int]]:
    for inner in itertools.product([False, True], repeat=count - 1):
        cuts = [0, *(i for i, cut in enumerate(inner, 1) if cut), count]
        if max(b - a for a, b in itertools.pairwise(cuts)) <= most:
            yield cuts


@given(LENGTHS, st.integers(1, 10))
@example([10, 10, 10, 11, 11, 11, 12, 12], 4)  # the best cut lies inside a run of equal lengths
@example([1, 1, 1, 1, 1], 2)
def test_no_other_cuts_cost_less(lengths: list[int], most: int) -> None:
    cuts = cheapest_cuts(lengths, most)
    assert cuts[0] == 0 and cuts[-1] == len(lengths)
    assert all(0 < b - a <= most for a, b in itertools.pairwise(cuts))
    assert cost(lengths, cuts) == min(cost(lengths, other) for other in all_cuts(len(lengths), most))


@given(LENGTHS)
def test_a_limit_above_the_batch_is_none(lengths: list[int]) -> None:
    assert cheapest_cuts(lengths, 1000) == cheapest_cuts(lengths, len(lengths))


def text_records(lengths: Sequence[int], *, language: bool = False, types: bool = False) -> TextRecords:
    tokens = [torch.arange(length) + 10 * i for i, length in enumerate(lengths)]
    labels = [t + 1 for t in tokens] if language else torch.arange(len(lengths))
    return TextRecords(tokens, labels, PADDING, [t % 2 for t in tokens] if types else None)


@given(st.lists(st.integers(1, 90), max_size=25), st.integers(0, 6), st.randoms())
def test_parts_are_the_batch(lengths: list[int], most: int, chance: random.Random) -> None:
    records = text_records(lengths)
    batch = [i for i in range(len(lengths)) if chance.random() < 0.6]
    subset = Subset(records, torch.tensor(batch, dtype=torch.long))
    for held, indices in ((records, batch), (subset, list(range(len(batch))))):
        parts = held.parts(torch.tensor(indices, dtype=torch.long), most)
        assert sorted(i for part in parts for i in part.tolist()) == indices
        assert not most or all(len(part) <= most for part in parts)
        assert all(len(part) for part in parts) or not indices


def test_long_and_short_texts_are_not_padded_to_each_other() -> None:
    parts = text_records([90, 2] * 10).parts(torch.arange(20), 0)
    assert sorted(len(part) for part in parts) == [10, 10]


@pytest.mark.parametrize("types", [False, True], ids=["", "segments"])
@pytest.mark.parametrize("language", [False, True], ids=["classes", "language"])
def test_a_padded_record_is_the_record_alone_and_padding_behind_it(language: bool, types: bool) -> None:
    lengths = [3, 1, 7]
    records = text_records(lengths, language=language, types=types)
    order = torch.tensor([2, 0, 1])
    inputs, labels = records.batch(order)
    assert set(inputs) == {"input_ids", "attention_mask", *(["token_type_ids"] if types else [])}
    behind = {"input_ids": PADDING, "attention_mask": 0, "token_type_ids": 0}
    for place, i in enumerate(order.tolist()):
        alone, label = records.batch(torch.tensor([i]))
        for name, values in inputs.items():
            assert values.dtype == torch.int64 and values.shape == (3, 7)
            assert torch.equal(values[place, : lengths[i]], alone[name][0])
            assert (values[place, lengths[i] :] == behind[name]).all()
        assert alone["attention_mask"].all() and torch.equal(alone["input_ids"][0], records.tokens[i])
        if language:
            assert torch.equal(labels[place, : lengths[i]], label[0]) and (labels[place, lengths[i] :] == IGNORED).all()
        else:
            assert labels[place] == label[0] == i


def test_what_one_more_pass_costs_decides() -> None:
    assert cheapest_cuts([1, 2], 2) == [0, 2]
    assert cheapest_cuts([1, 2], 2, part_cost=0) == [0, 1, 2]


@pytest.mark.parametrize("most", [0, 1, 3, 10])
def test_tensors_are_cut_in_order(most: int) -> None:
    records: RecordSet = Records(torch.arange(7.0), torch.arange(7))
    parts = records.parts(torch.tensor([5, 1, 2, 6]), most)
    assert torch.cat(parts).tolist() == [5, 1, 2, 6] and all(len(part) <= (most or 4) for part in parts)
