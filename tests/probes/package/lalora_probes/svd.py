"""B-only training; after each round the server turns the factors so that the rows of A are orthonormal (as FedSVD does).

site:    trains B, sends B            server:  B = mean of B_i;  B A = U S Vᵀ;  A = Vᵀ,  B = U S;  sends both
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from lalora_flwr.adapter.slots import LORA_A, LORA_B, Layout
from lalora_flwr.methods.merges import Memory, Merge, Merged, Now
from lalora_flwr.methods.method import Method
from lalora_flwr.methods.schedules import ONLY_B
from lalora_flwr.methods.travel import EVERYTHING_DOWN
from lalora_flwr.methods.updates import Tensors, Updates


class Orthonormal(Merge):
    name = "orthonormal"
    needs_each = False

    def __call__(self, current: Tensors, updates: Updates, memory: Memory, now: Now) -> Merged:
        merged = {name: total / updates.count for name, total in updates.total.items()}
        for parts in LAYERS(now.layout).values():
            A, B = parts[LORA_A], parts[LORA_B]
            U, S, Vt = np.linalg.svd(merged[B] @ current[A].astype(np.float64), full_matrices=False)
            rank = current[A].shape[0]
            merged[A], merged[B] = Vt[:rank], U[:, :rank] * S[:rank]
        return Merged({name: value.astype(np.float32) for name, value in merged.items()}, rewritten=True)


def LAYERS(layout: Layout) -> dict[str, dict[str, str]]:
    """The slots' names by layer and part, of layers that have factors."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name, slot in layout.items():
        if slot.part in (LORA_A, LORA_B):
            found[slot.layer][slot.part] = name
    return found


METHOD = Method(schedule=ONLY_B, travel=EVERYTHING_DOWN, merge=Orthonormal())
