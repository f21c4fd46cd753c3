"""Made-up texts: what the check before training, counting and benchmarks feed a text model with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Names of the numbers of tokens at which a network changes what it does: windows of attention, tables of positions.
THRESHOLDS = ("original_max_position_embeddings", "window", "local_attention", "chunk", "block_size", "seq_length")
SHORT = 12  # tokens of a short text
SHORTEST = 2  # a prompt and a response of one token each
BUDGET = 4096  # tokens that the long texts of the check hold together, unless two of the longest have more


def made_up_tokens(lengths: Sequence[int], config: PretrainedConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Random tokens, one text per length, padded to the longest; int64 (texts, longest)."""
    padding, vocabulary = int(config.pad_token_id or 0), int(config.vocab_size)
    ids = torch.randint(3, vocabulary, (len(lengths), max(lengths)), generator=generator)
    ids = ids.masked_fill(ids == padding, 3 + (padding - 2) % (vocabulary - 3))  # some heads look for the first padding
    mask = torch.arange(max(lengths)).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)
    return {"input_ids": ids.masked_fill(~mask, padding), "attention_mask": mask.long()}


def short_lengths(count: int, longest: int) -> list[int]:
    """Lengths of short texts, from `SHORTEST` to `SHORT` tokens."""
    top = min(SHORT, longest)
    return [max(SHORTEST, top - i) if i < count - 1 else SHORTEST for i in range(count)]


def telling_lengths(config: PretrainedConfig, longest: int) -> list[int]:
    """Lengths of texts that show whether a text's length changes what the network does to the others of its batch.

    The longest comes with a short one, then with one on each side of the highest threshold below it that the configuration
    names, and with one in the middle, as many as `BUDGET` admits.
    """
    near = [number for number in thresholds(config) if number < longest][-1:]
    wanted = [longest, SHORT - 1, *near, *(n + 1 for n in near), longest // 2]
    distinct = dict.fromkeys(n for n in wanted if SHORTEST <= n <= longest)
    return list(distinct)[: max(2, BUDGET // longest)]


def thresholds(config: PretrainedConfig) -> list[int]:
    """The numbers of tokens in a configuration at which something changes, ascending."""
    return sorted(set(_thresholds(config.to_dict())))


def _thresholds(values: Mapping[str, object]) -> Iterator[int]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _thresholds(value)
        elif type(value) is int and value > 0 and any(part in name for part in THRESHOLDS):
            yield value
