"""Which records are public: draws that are the same whatever the run's seed is."""

from __future__ import annotations

import torch

from lalora_flwr.ground.seeds import derive_seed

FIXED_SEED = 2602


def held_out(count: int, share: float) -> tuple[list[int], list[int]]:
    """A share of the places 0 … count - 1, at least one of them, and the rest; both ascending."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(FIXED_SEED)).tolist()
    taken = max(1, round(share * count))
    return sorted(order[:taken]), sorted(order[taken:])


def some(count: int, most: int) -> list[int]:
    """At most ``most`` of the places 0 … count - 1, ascending; 0: all."""
    if not most or most >= count:
        return list(range(count))
    generator = torch.Generator().manual_seed(derive_seed(FIXED_SEED, "test-records"))
    return sorted(torch.randperm(count, generator=generator)[:most].tolist())
