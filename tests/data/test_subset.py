"""Some records of a set are these records, by their place in it."""

from __future__ import annotations

import torch

from lalora_flwr.data.records import Records, Subset
from lalora_flwr.data.texts import TextRecords


def test_a_batch_of_some_records_is_that_of_the_set() -> None:
    whole = Records(torch.arange(6.0).unsqueeze(1), torch.arange(6) + 10)
    some = Subset(whole, torch.tensor([5, 2, 3]))
    inputs, labels = some.batch(torch.tensor([2, 0]))
    assert len(some) == 3 and inputs.flatten().tolist() == [3.0, 5.0] and labels.tolist() == [13, 15]  # type: ignore[union-attr]


def test_parts_of_some_texts_are_their_places() -> None:
    whole = TextRecords([torch.ones(n, dtype=torch.long) for n in (4, 1, 3, 2)], torch.arange(4), 0)
    some = Subset(whole, torch.tensor([3, 0, 1]))
    parts = some.parts(torch.arange(3), 1)
    assert [part.tolist() for part in parts] == [[2], [0], [1]]  # lengths 1, 2, 4
    assert [int(some.batch(part)[1]) for part in parts] == [1, 3, 0]
