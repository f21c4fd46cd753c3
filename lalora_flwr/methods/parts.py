"""Sites that differ: what a site holds and trains follows from its profile, for the server and the site alike.

    profile   rank=<R>    holds the first R components of every LoRA pair: rows of A, columns of B; at most the run's rank
              layers=<N>  trains the last N of the layers that the adapter is on; the others it runs as the server sends them
              steps=<K>   takes the first K local steps of a round, never more than the run has; its noise is calibrated for
                          those, so that every site has the same ε
    any of them, with spaces between; none: everything. What a profile says of the site's own machine (``batch``,
    ``precision``; `lalora_flwr.wire.profile`) goes with every method.

The scale of an adapter stays the run's alpha / rank whatever a site holds, so that a component means the same everywhere.
Whoever trained an entry counts alike in its mean, however many steps it took. A site of fewer steps moves less, and by less
noise; weights that made up for it, as those of FedNova (arXiv 2007.07481), would multiply its noise by the same factor.

Guarantee: a profile is its owner's word and public. It decides which coordinates exist in a step, and how many steps there are,
never ε; σ and q follow from the owner's number of records and from the steps as they do at every site, and each step that is
taken is counted in the site's own ledger. What a site does not train is neither in the norm that is clipped nor noised.
"""

from __future__ import annotations

from lalora_flwr.adapter.slots import LORA_A, LORA_B, Layout, Mask
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.travel import Travel, Turn
from lalora_flwr.wire.profile import Profile

WORDS = (
    "rank=<R>, layers=<N>, steps=<K>, batch=<N>, whole numbers from 1, and precision=float32, bfloat16 or nf4, each at most once"
)


class Parts(Travel):
    """Down all slots as far as a site holds them; up those that it trained in the round."""

    takes_profiles = True

    def check(self, profile: Profile) -> None:
        if profile.told.unknown:
            raise ConfigError(f"profile = {profile.words!r}: must be of {WORDS}")

    def held(self, layout: Layout, profile: Profile) -> Layout:
        rank = profile.told.rank
        full = [slot.shape[0] for slot in layout.values() if slot.part == LORA_A]
        if rank is None or not full:
            return layout
        own = min(rank, *full)
        return layout.resized(LORA_A, axis=0, size=own).resized(LORA_B, axis=1, size=own)

    def trains(self, layout: Layout, profile: Profile) -> Mask:
        layers = profile.told.layers
        factors = layout.of(LORA_A, LORA_B)
        if layers is None or not factors:
            return layout.names
        last = list(dict.fromkeys(layout[name].layer for name in layout if name in factors))[-layers:]
        return frozenset(name for name in layout if name not in factors or layout[name].layer in last)

    def steps(self, most: int, profile: Profile) -> int:
        return min(most, profile.told.steps or most)

    def down(self, turn: Turn) -> Mask:
        return turn.layout.names

    def up(self, turn: Turn) -> Mask:
        return turn.trained


PARTS = Parts()
