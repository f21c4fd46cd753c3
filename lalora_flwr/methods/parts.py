"""Sites that differ: what a site holds and trains follows from its profile, for the server and the site alike.

    profile   rank=<R>    holds the first R components of every LoRA pair: rows of A, columns of B; at most the run's rank
              layers=<N>  trains the last N of the layers that the adapter is on; the others it runs as the server sends them
    both or one of them, with a space between; none: everything

The scale of an adapter stays the run's alpha / rank whatever a site holds, so that a component means the same everywhere.

Guarantee: a profile is its owner's word and public. It decides which coordinates exist in a step, never σ, q or the number of
steps, which a site takes from its own ledger; what it does not train is neither in the norm that is clipped nor noised.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lalora_flwr.adapter.slots import LORA_A, LORA_B, Layout, Mask
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.travel import Travel, Turn
from lalora_flwr.wire.profile import Profile

_WORD = re.compile(r"(rank|layers)=([1-9][0-9]{0,5})", re.ASCII)


@dataclass(frozen=True)
class Part:
    """What a profile says; None: no bound.

    Attributes:
        rank: components of each LoRA pair that the site holds.
        layers: how many layers it trains, counted from the last.
    """

    rank: int | None = None
    layers: int | None = None

    @staticmethod
    def of(words: str) -> Part:
        """
        Raises:
            ConfigError: they are no profile.
        """
        told: dict[str, int] = {}
        for word in words.split():
            match = _WORD.fullmatch(word)
            if match is None or match[1] in told:
                raise ConfigError(f"profile = {words!r}: must be rank=<R>, layers=<N> or both, whole numbers from 1")
            told[match[1]] = int(match[2])
        return Part(told.get("rank"), told.get("layers"))


class Parts(Travel):
    """Down all slots as far as a site holds them; up those that it trained in the round."""

    takes_profiles = True

    def check(self, profile: Profile) -> None:
        Part.of(profile.words)

    def held(self, layout: Layout, profile: Profile) -> Layout:
        rank = Part.of(profile.words).rank
        full = [slot.shape[0] for slot in layout.values() if slot.part == LORA_A]
        if rank is None or not full:
            return layout
        own = min(rank, *full)
        return layout.resized(LORA_A, axis=0, size=own).resized(LORA_B, axis=1, size=own)

    def trains(self, layout: Layout, profile: Profile) -> Mask:
        layers = Part.of(profile.words).layers
        factors = layout.of(LORA_A, LORA_B)
        if layers is None or not factors:
            return layout.names
        last = list(dict.fromkeys(layout[name].layer for name in layout if name in factors))[-layers:]
        return frozenset(name for name in layout if name not in factors or layout[name].layer in last)

    def down(self, turn: Turn) -> Mask:
        return turn.layout.names

    def up(self, turn: Turn) -> Mask:
        return turn.trained


PARTS = Parts()
