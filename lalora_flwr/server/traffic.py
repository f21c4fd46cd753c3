"""What travels between the server and a site in a round, before the run: bytes of the adapter, by the site's profile."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lalora_flwr.adapter.slots import Layout, Mask
from lalora_flwr.methods.method import Method
from lalora_flwr.settings import Settings
from lalora_flwr.wire.profile import Profile
from lalora_flwr.wire.tensors import ARRAY_HEADER


@dataclass(frozen=True)
class Traffic:
    """Bytes to and from one site of a kind, as the ``bytes_down`` and ``bytes_up`` of a round's metrics add them up.

    Attributes:
        profile: what its owner says of it; empty: nothing.
        sites: how many of the run's virtual sites say so.
        down: in every round.
        up: in the first two rounds (methods that alternate by round differ) after that of a ridge head.
    """

    profile: str
    sites: int
    down: int
    up: tuple[int, int]


def traffic(settings: Settings, method: Method, layout: Layout, profile: Profile, sites: int = 1) -> Traffic:
    """Of a site of this profile, of which there are so many; ``layout``: the slots as the server holds them."""
    itemsize = np.dtype(method.transport.dtype).itemsize
    held, steps = method.travel.held(layout, profile), settings.train.local_steps
    first = 2 if settings.ridge_first else 1
    down, up = [], []
    for server_round in (first, first + 1):
        directive = method.schedule.foreseen(layout, server_round, method.merge.start(layout))
        own = method.schedule.within(held, directive)
        turn = method.turn(own, server_round, steps, directive, profile)
        down.append(_size(own, method.travel.down(turn)))
        up.append(_size(own, method.travel.up(turn), itemsize))
    return Traffic(profile.words, sites, down[0], (up[0], up[1]))


def traffic_by_profile(settings: Settings, method: Method, layout: Layout) -> tuple[Traffic, ...]:
    """Of each kind of virtual sites, in the order in which the run's ``profiles`` name them first."""
    kinds, sites = settings.kinds_of_sites, dict[str, int]()
    for site in range(kinds):
        words = settings.words_of(site)
        sites[words] = sites.get(words, 0) + len(range(site, settings.num_supernodes, kinds))
    return tuple(traffic(settings, method, layout, Profile(0, words), count) for words, count in sites.items())


def _size(layout: Layout, names: Mask, itemsize: int = 4) -> int:
    return sum(itemsize * math.prod(slot.shape) + ARRAY_HEADER for slot in layout.only(names).values())
