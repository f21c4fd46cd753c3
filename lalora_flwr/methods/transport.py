"""How updates reach the server: in the clear, or so that it sees their sum only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lalora_flwr.adapter.slots import Mask
from lalora_flwr.methods.updates import Update, Updates, together
from lalora_flwr.privacy.counting import Ledger
from lalora_flwr.privacy.mechanism import PrivateSum
from lalora_flwr.privacy.randomness import RandomSource
from lalora_flwr.settings import Settings
from lalora_flwr.wire.profile import Profile
from lalora_flwr.wire.public import Public
from lalora_flwr.wire.sharing import Secrets
from lalora_flwr.wire.tensors import LARGEST, BadReply

Packed = Mapping[str, NDArray[np.generic]]  # what travels, by slot


@dataclass(frozen=True)
class Exchange:
    """One round's exchange as both ends know it.

    Attributes:
        server_round: from 1.
        words: what the transport tells every site of the round.
        clip_norm: C of the run.
    """

    server_round: int
    words: Public = field(default_factory=dict)
    clip_norm: float = 1.0


@dataclass(frozen=True)
class Sender:
    """The site that packs.

    Attributes:
        site: its number.
        secrets: what it masks with, if the transport needs it.
    """

    site: int
    secrets: Secrets | None = None


class Transport:
    """Both ends of the way that updates take.

    Guarantee: a transport gets tensors that are released anyway, and can hide them from the server. One that takes less noise
    into a release than the site's own, as a secure sum does, must say what the site has to hold it to.

    Attributes:
        name: as summaries write it.
        hides_updates: the server learns the sum only; then a merge must not need each update, and a site whose reply is lost
            spoils the attempt, which is repeated with those that answered.
        dtype: of what travels.
    """

    name: str = ""
    hides_updates: bool = False
    dtype: type[np.generic] = np.float32

    def least_sites(self, settings: Settings) -> int:
        """With fewer sites there is no sum."""
        return 1

    def words(self, attempt: int, sites: Sequence[Profile], settings: Settings) -> Public:
        """What the sites must know beforehand.

        Args:
            attempt: from 1; more if a site's reply was lost, or rejected, in the attempts of the round before it.
            sites: all that are asked.
            settings: the run's.

        Raises:
            RunFailed: these sites cannot be asked together.
        """
        return {}

    def attempt(self, exchange: Exchange) -> int:
        """Which attempt of the round it is, from 1."""
        return 1

    def noise(self, exchange: Exchange) -> float:
        """Standard deviation of the noise on an entry of the mean gradient that sites have together; 0: each has its own."""
        return 0.0

    def accepts(self, words: Public) -> bool:
        """Whether words are this transport's own; a site refuses an order with any others."""
        return not words

    def pack(self, tensors: Packed, sender: Sender, exchange: Exchange) -> Packed:
        """At the site: what travels instead of its tensors.

        Args:
            tensors: by slot: the adapter's after the round, or where the server steps what `released` gave.
            sender: the site.
            exchange: the round.

        Raises:
            SiteRefusal: with a fixed reason, if the site does not send under these words.
        """
        raise NotImplementedError

    def released(
        self, total: PrivateSum, ledger: Ledger, source: RandomSource, exchange: Exchange, kept: Mask = frozenset()
    ) -> dict[str, Tensor]:
        """At the site, where the server steps: one of the step's releases, by slot, where the adapter computes or on the CPU.

        Of the slots ``kept``, which stay at the site, the noised mean gradient.
        """
        return total.release(ledger, source)

    def check(self, name: str, value: NDArray[np.generic]) -> None:
        """At the server: refuse an array of the right shape and type that no honest site sends.

        Raises:
            BadReply: naming what is wrong.
        """

    def unpack(self, replies: Mapping[int, Packed], exchange: Exchange) -> Updates:
        """At the server: the updates of the round, as far as it may know them.

        Args:
            replies: those that were accepted, by site, in the order of the sites; at least one.
            exchange: the round.

        Raises:
            BadReply: they do not make a sum together.
        """
        raise NotImplementedError


class Plain(Transport):
    """Float32 tensors as they are; TLS and the run's own server are all that protects them on the way."""

    name = "plain"

    def pack(self, tensors: Packed, sender: Sender, exchange: Exchange) -> Packed:
        return tensors

    def check(self, name: str, value: NDArray[np.generic]) -> None:
        if not np.isfinite(value).all():
            raise BadReply(f"{name} holds values that are not finite")
        if (np.abs(value) > LARGEST).any():
            raise BadReply(f"{name} holds values above {LARGEST:g}, as when train.lr is too large")

    def unpack(self, replies: Mapping[int, Packed], exchange: Exchange) -> Updates:
        return together(
            [Update(site, {n: v.astype(np.float32, copy=False) for n, v in t.items()}) for site, t in replies.items()]
        )


PLAIN = Plain()
