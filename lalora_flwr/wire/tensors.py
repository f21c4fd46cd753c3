"""Tensors as they travel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord

from lalora_flwr.wire.npy import record_of, values_of

if TYPE_CHECKING:
    import torch

ARRAY_HEADER = 128  # bytes before the values of a ``.npy``
MOST_HEADER = 1024  # the same at most, whoever wrote it
LARGEST = 1e4  # of a tensor's values; factors of a useful adapter are below 10, and one reply above this ruins a mean


class BadReply(Exception):
    """A reply that does not keep to the contract; never averaged."""


def to_arrays(state: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """Tensors as float32 arrays, in sorted order of names."""
    import torch  # a site that is only asked who it is needs no torch

    return record_of({name: state[name].detach().to("cpu", torch.float32).numpy() for name in sorted(state)})


def to_tensors(arrays: ArrayRecord) -> dict[str, torch.Tensor]:
    """The tensors of an `ArrayRecord`, by name."""
    import torch

    return {name: torch.from_numpy(values_of(array)) for name, array in arrays.items()}


def num_bytes(arrays: ArrayRecord) -> int:
    """Bytes of the arrays as they travel (each a ``.npy``: `ARRAY_HEADER` and the values)."""
    return sum(len(array.data) for array in arrays.values())
