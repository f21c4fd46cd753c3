"""What a filter remembers of a site's earlier steps, as records that Flower keeps or carries."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import ArrayRecord

from lalora_flwr.methods.filters import State
from lalora_flwr.wire.tensors import to_arrays, to_tensors

MARK = "::"  # between the slot and the name that the filter gave


def to_record(memory: Mapping[str, State]) -> ArrayRecord:
    """The memory of all slots; tensors become float32."""
    return to_arrays({f"{slot}{MARK}{name}": value for slot, state in memory.items() for name, value in state.items()})


def from_record(record: object) -> dict[str, State]:
    """The memory of `to_record`; empty for anything that is no record."""
    memory: dict[str, State] = {}
    if isinstance(record, ArrayRecord):
        for name, value in to_tensors(record).items():
            slot, _, own = name.rpartition(MARK)
            memory.setdefault(slot, {})[own] = value
    return memory
