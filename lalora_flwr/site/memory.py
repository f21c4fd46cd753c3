"""What a site has of its earlier rounds, as records that Flower keeps or carries: what a filter remembers of its steps, and in a
simulation the slots that stay with it."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import ArrayRecord
from torch import Tensor

from lalora_flwr.methods.filters import State
from lalora_flwr.wire.tensors import to_arrays, to_tensors

MARK = "::"  # between the slot and the name that the filter gave


def to_record(memory: Mapping[str, State], kept: Mapping[str, Tensor] | None = None) -> ArrayRecord:
    """The memory of all slots, and the values of those that stay at the site; tensors become float32."""
    states = {f"{slot}{MARK}{name}": value for slot, state in memory.items() for name, value in state.items()}
    return to_arrays({**states, **(kept or {})})


def from_record(record: object) -> dict[str, State]:
    """The memory of `to_record`; empty for anything that is no record."""
    memory: dict[str, State] = {}
    if isinstance(record, ArrayRecord):
        for name, value in to_tensors(record).items():
            slot, mark, own = name.rpartition(MARK)
            if mark:
                memory.setdefault(slot, {})[own] = value
    return memory


def kept_from(record: object) -> dict[str, Tensor]:
    """The slots of `to_record` that stay at the site; empty for anything that is no record."""
    found = to_tensors(record) if isinstance(record, ArrayRecord) else {}
    return {name: value for name, value in found.items() if MARK not in name}
