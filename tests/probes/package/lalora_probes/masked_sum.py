"""Updates under pairwise masks that cancel in the sum. A toy: the masks come from the names of the pair, not from secret keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lalora_flwr.methods.method import Method
from lalora_flwr.methods.schedules import schedule_of
from lalora_flwr.methods.transport import Exchange, Packed, Sender, Transport
from lalora_flwr.methods.updates import Updates
from lalora_flwr.settings import Settings
from lalora_flwr.wire.profile import Profile
from lalora_flwr.wire.public import Public
from lalora_flwr.wire.tensors import BadReply

GRID = 2.0**-32


class MaskedSum(Transport):
    name = "masked-sum"
    hides_updates = True
    dtype = np.uint64

    def words(self, attempt: int, sites: Sequence[Profile], settings: Settings) -> Public:
        return {"sites": [profile.site for profile in sites]}

    def accepts(self, words: Public) -> bool:
        sites = words.get("sites")
        return set(words) == {"sites"} and isinstance(sites, list) and all(type(site) is int for site in sites)

    def pack(self, tensors: Packed, sender: Sender, exchange: Exchange) -> Packed:
        site = sender.site
        packed = {name: np.rint(value / GRID).astype(np.int64).view(np.uint64) for name, value in tensors.items()}
        for other in exchange.words["sites"]:
            if other != site:
                draw = np.random.default_rng([min(site, other), max(site, other), exchange.server_round])
                for name in sorted(packed):
                    mask = draw.integers(0, 2**64, packed[name].shape, np.uint64)
                    packed[name] = packed[name] + mask if site < other else packed[name] - mask
        return packed

    def unpack(self, replies: Mapping[int, Packed], exchange: Exchange) -> Updates:
        if sorted(replies) != sorted(exchange.words["sites"]):
            raise BadReply("a site is missing, and with it what cancels the masks of the others")
        total = {name: sum(reply[name] for reply in replies.values()) for name in next(iter(replies.values()))}
        return Updates({name: value.view(np.int64) * GRID for name, value in total.items()}, len(replies))


METHOD = Method(schedule=schedule_of("step:BA"), transport=MaskedSum())
