"""What is trained: one description of each tensor. No code asks a name what it is."""

from __future__ import annotations

import hashlib
from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LORA_A, LORA_B, HEAD = "lora_A", "lora_B", "head"  # parts that this package knows; a form may have others


@dataclass(frozen=True)
class Slot:
    """One tensor of an adapter.

    Attributes:
        name: its name in messages, checkpoints and adapter folders; PEFT's own where PEFT knows the form.
        layer: the module it belongs to, by its name in the base model.
        part: its role in the layer: ``lora_A``, ``lora_B``, ``head``, ``bias``, …
        shape: of the tensor.
        feature_axis: the axis along which neighbours are features of one kind, for filters; None if there is none.
        frozen: it never trains: no site has a gradient of it, and only the server may change it.
    """

    name: str
    layer: str
    part: str
    shape: tuple[int, ...]
    feature_axis: int | None = None
    frozen: bool = False


Mask = frozenset[str]  # names of slots


class Layout(Mapping[str, Slot]):
    """The slots of an adapter by name, in the order in which they are clipped, noised and stepped. Never changes.

    What is asked of it in every step, or for every site, is worked out once.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        """
        Raises:
            ValueError: two slots have one name.
        """
        self._slots: dict[str, Slot] = {}
        for slot in slots:
            if slot.name in self._slots:
                raise ValueError(f"two slots are called {slot.name}")
            self._slots[slot.name] = slot
        self._hash = hash(tuple(self._slots.values()))
        self._of: dict[tuple[str, ...], Mask] = {}

    def __getitem__(self, name: str) -> Slot:
        return self._slots[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def items(self) -> ItemsView[str, Slot]:
        return self._slots.items()

    def values(self) -> ValuesView[Slot]:
        return self._slots.values()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and list(self.values()) == list(other.values())

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def names(self) -> Mask:
        return frozenset(self._slots)

    @cached_property
    def trainable(self) -> Mask:
        """The slots that may train."""
        return frozenset(name for name, slot in self.items() if not slot.frozen)

    @cached_property
    def parts(self) -> frozenset[str]:
        """The roles that there are."""
        return frozenset(slot.part for slot in self.values())

    def of(self, *parts: str) -> Mask:
        """The slots with one of these roles."""
        if parts not in self._of:
            self._of[parts] = frozenset(name for name, slot in self.items() if slot.part in parts)
        return self._of[parts]

    def only(self, mask: Iterable[str]) -> Layout:
        """Some of the slots, in the same order.

        Raises:
            KeyError: a name is not in the layout.
        """
        wanted = frozenset(mask)
        if unknown := sorted(wanted - self.names):
            raise KeyError(f"not part of this adapter: {', '.join(unknown[:8])}")
        return Layout(slot for name, slot in self.items() if name in wanted)

    def resized(self, part: str, *, axis: int, size: int, layer: str | None = None) -> Layout:
        """With another size along an axis of every slot of a part, of one layer if it is named.

        ``resized(LORA_A, axis=0, size=2)`` keeps two rows.
        """

        def shape(slot: Slot) -> tuple[int, ...]:
            return (*slot.shape[:axis], size, *slot.shape[axis + 1 :])

        return Layout(
            replace(slot, shape=shape(slot)) if slot.part == part and layer in (None, slot.layer) else slot
            for slot in self.values()
        )


def factors_of(layout: Layout) -> Iterator[tuple[str, str]]:
    """The names of the slots of A and B of each layer that has both, in the order of the layers."""
    parts: dict[str, dict[str, str]] = {}
    for name, slot in layout.items():
        parts.setdefault(slot.layer, {})[slot.part] = name
    for own in parts.values():
        if LORA_A in own and LORA_B in own:
            yield own[LORA_A], own[LORA_B]


def corner(tensor: Tensor, slot: Slot) -> Tensor:
    """The leading corner of a tensor that has the slot's shape; the tensor itself if that is its shape."""
    return tensor[tuple(slice(size) for size in slot.shape)]


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes: equal on two machines only if the tensors are identical."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(tensor.numpy().reshape(-1).data)
    return sha.hexdigest()
