"""The server says which layers train next: the half whose B moved most, by an average over the rounds. All of it is public."""

from __future__ import annotations

import numpy as np

from lalora_flwr.adapter.slots import LORA_B, Layout, Mask
from lalora_flwr.methods.merges import Mean, Memory, Merged, Now
from lalora_flwr.methods.method import Method
from lalora_flwr.methods.schedules import Schedule
from lalora_flwr.methods.travel import TRAINED
from lalora_flwr.methods.updates import Tensors, Updates
from lalora_flwr.wire.public import Public


class LayerMask(Schedule):
    text = "layer-mask"
    period = 1

    def mask(self, layout: Layout, server_round: int, step: int, directive: Public) -> Mask:
        chosen = directive.get("layers", [slot.layer for slot in layout.values()])
        return frozenset(name for name, slot in layout.items() if slot.layer in chosen)

    def accepts(self, layout: Layout, directive: Public) -> bool:
        layers = {slot.layer for slot in layout.values()}
        chosen = directive.get("layers", [])
        return set(directive) <= {"layers"} and isinstance(chosen, list) and layers.issuperset(chosen)


class Scored(Mean):
    name = "scored-mean"

    def __call__(self, current: Tensors, updates: Updates, memory: Memory, now: Now) -> Merged:
        tensors = super().__call__(current, updates, memory, now).tensors
        scores = dict(memory.notes)
        for name in now.layout.of(LORA_B) & set(tensors):
            layer, moved = now.layout[name].layer, float(np.linalg.norm(tensors[name] - current[name]))
            scores[layer] = 0.5 * float(scores.get(layer, moved)) + 0.5 * moved
        best = sorted(scores, key=lambda layer: (-float(scores[layer]), layer))[: max(1, len(scores) // 2)]
        return Merged(
            tensors, Memory(scores, {"rounds": memory.tensors.get("rounds", np.zeros(1)) + 1}), {"layers": sorted(best)}
        )


METHOD = Method(schedule=LayerMask(), merge=Scored(), travel=TRAINED)
