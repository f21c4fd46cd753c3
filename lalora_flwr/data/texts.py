"""Texts as tokens of any length, padded only within a part of a batch."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100  # label of a token that bears no loss, as in transformers
PART_COST = 64  # what one more pass through the model costs, in tokens (measured on BERT-sized models on a CPU)


@dataclass(frozen=True)
class TextRecords:
    """Token ids of each record, and its labels: one class, or for language modelling one label per token.

    Attributes:
        tokens: per record, int64 (its length,).
        labels: int64 (n,), or per record int64 (its length,).
        padding: the id that fills up shorter records.
        types: per record the segment of each token, for models that tell a pair of texts apart by it.
        references: for language modelling, the answers as text.
    """

    tokens: Sequence[Tensor]
    labels: Tensor | Sequence[Tensor]
    padding: int
    types: Sequence[Tensor] | None = None
    references: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: Sequence[int]) -> TextRecords:
        """Some of the records, in order."""
        labels = self.labels[torch.tensor(rows, dtype=torch.long)] if isinstance(self.labels, Tensor) else _of(self.labels, rows)
        types = None if self.types is None else _of(self.types, rows)
        return TextRecords(_of(self.tokens, rows), labels, self.padding, types, _of(self.references, rows))

    @staticmethod
    def joined(parts: Sequence[TextRecords]) -> TextRecords:
        """One set of the records of several, at least one, which one model encoded."""
        first, labels = parts[0], [part.labels for part in parts]
        tensors = [own for own in labels if isinstance(own, Tensor)]
        return TextRecords(
            [tokens for part in parts for tokens in part.tokens],
            torch.cat(tensors) if len(tensors) == len(labels) else [label for own in labels for label in own],
            first.padding,
            None if first.types is None else [types for part in parts for types in part.types or ()],
            [reference for part in parts for reference in part.references],
        )

    def batch(self, indices: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs ``input_ids``, ``attention_mask`` (and ``token_type_ids``) of shape (n, longest of these records)."""
        rows = indices.tolist()
        ids = [self.tokens[i] for i in rows]
        inputs = {
            "input_ids": _padded(ids, self.padding),
            "attention_mask": _padded([torch.ones_like(i) for i in ids], 0),
        }
        if self.types is not None:
            inputs["token_type_ids"] = _padded([self.types[i] for i in rows], 0)
        if isinstance(self.labels, Tensor):
            return inputs, self.labels[indices]
        return inputs, _padded([self.labels[i] for i in rows], IGNORED)

    def parts(self, indices: Tensor, most: int) -> list[Tensor]:
        """The batch sorted by length and cut where that costs the fewest tokens, padding and passes included.

        Which records join the step was drawn before and is not touched; how they are grouped changes the sum only by
        rounding.
        """
        if not len(indices):
            return [indices]
        lengths = torch.tensor([len(self.tokens[i]) for i in indices.tolist()])
        order = lengths.argsort(stable=True)
        ordered, ascending = indices[order], lengths[order].tolist()
        cuts = cheapest_cuts(ascending, most or len(ascending))
        return [ordered[a:b] for a, b in itertools.pairwise(cuts)]


T = TypeVar("T")


def _of(values: Sequence[T], rows: Sequence[int]) -> list[T]:
    return [values[row] for row in rows] if values else []


def _padded(sequences: list[Tensor], padding: int) -> Tensor:
    if not sequences:  # a Poisson batch may be empty
        return torch.zeros(0, 0, dtype=torch.long)
    return pad_sequence(sequences, batch_first=True, padding_value=padding)


def cheapest_cuts(lengths: Sequence[int], most: int, part_cost: int = PART_COST) -> list[int]:
    """Where to cut ascending lengths so that Σ (records · longest + ``part_cost``) over the parts is least.

    Args:
        lengths: at least one, ascending.
        most: records a part may hold.
        part_cost: tokens.

    Returns:
        Positions from 0 to ``len(lengths)``; a part lies between two neighbours.
    """
    count = len(lengths)
    ends = [i for i in range(1, count + 1) if i == count or lengths[i] != lengths[i - 1]]
    # Inside a run of equal lengths a cut costs no more the later it comes: it lies at the end of one, or where a part is full.
    best: dict[int, tuple[int, int]] = {0: (0, 0)}  # place -> (cost up to it, where its part begins)
    for start in range(count):
        if start not in best:
            continue
        full = min(start + most, count)
        for end in {full, *ends[bisect_right(ends, start) : bisect_right(ends, full)]}:
            cost = best[start][0] + (end - start) * lengths[end - 1] + part_cost
            best[end] = min(best.get(end, (cost, start)), (cost, start))
    cuts = [len(lengths)]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][1])
    return cuts[::-1]
