"""Every site has a rank of its own (as HetLoRA): it holds, trains and sends the first rows of A and columns of B."""

from __future__ import annotations

import numpy as np

from lalora_flwr.adapter.slots import LORA_A, LORA_B, Layout
from lalora_flwr.methods.merges import Memory, Merge, Merged, Now
from lalora_flwr.methods.method import Method
from lalora_flwr.methods.schedules import BOTH
from lalora_flwr.methods.travel import Everything
from lalora_flwr.methods.updates import Tensors, Updates
from lalora_flwr.wire.profile import Profile


class Ranks(Everything):
    """A real site's rank is what its owner says, ``profile = "rank=2"``; a virtual one's follows from its number."""

    def held(self, layout: Layout, profile: Profile) -> Layout:
        rank = next(slot.shape[0] for slot in layout.values() if slot.part == LORA_A)
        told = profile.words.removeprefix("rank=")
        own = min(rank, int(told)) if told.isdigit() else 1 + profile.site % rank
        return layout.resized(LORA_A, axis=0, size=own).resized(LORA_B, axis=1, size=own)


class Padded(Merge):
    """The mean of what sites sent, each padded with zeros."""

    name = "padded-mean"

    def __call__(self, current: Tensors, updates: Updates, memory: Memory, now: Now) -> Merged:
        total = {name: np.zeros(slot.shape) for name, slot in now.layout.items()}
        for update in updates.each:
            for name, value in update.tensors.items():
                total[name][tuple(slice(size) for size in value.shape)] += value
        return Merged({name: (value / updates.count).astype(np.float32) for name, value in total.items()})


METHOD = Method(schedule=BOTH, travel=Ranks(), merge=Padded())
