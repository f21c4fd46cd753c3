"""A secure sum: the server sees the sum of the sites' noised gradients and nothing else, so n sites share one noise.

    server           names the attempt, its sites and the share s of the noise
    site i           y_i = round((Σ clip(g, C) + N(0, s²C²)) / h) + Σ_j ± stream(i, j)   mod 2^64
    server           sum of y_i, read as int64, times h, divided by the expected records of all batches

One message a round and site, and no second chance: where a site is missing the sum is noise, and the others are asked again,
with new draws, as a new attempt. What holds for whom is in ``docs/secure_sum.md``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lalora_flwr.adapter.slots import Mask
from lalora_flwr.ground.errors import RunFailed, SiteRefusal
from lalora_flwr.methods.transport import Exchange, Packed, Sender, Transport
from lalora_flwr.methods.updates import Updates
from lalora_flwr.privacy.counting import Ledger
from lalora_flwr.privacy.mechanism import MOST_SITES, PrivateSum, Share
from lalora_flwr.privacy.noise import mechanism_for
from lalora_flwr.privacy.randomness import RandomSource
from lalora_flwr.settings import Settings
from lalora_flwr.wire.profile import Profile
from lalora_flwr.wire.public import Public
from lalora_flwr.wire.sharing import masked
from lalora_flwr.wire.tensors import BadReply

SLACK = 1.001  # a share is a little above what it must be: sites' own σ may be of another version of numpy and scipy
MOST_ATTEMPTS = 10**6  # of a round
MOST_ALTOGETHER = 10**15  # records of all sites
FAR = 40.0  # standard deviations of the whole noise that no honest sum is beyond the records' own


@dataclass(frozen=True)
class Attempt:
    """What the server says of an attempt.

    Attributes:
        number: from 1 in each round.
        sites: names in the owners' rosters, sorted.
        share: s, the noise multiplier of each site's own part.
        batch: expected records of all sites' batches together.
        records: declared records of all sites together.
    """

    number: int
    sites: tuple[str, ...]
    share: float
    batch: float
    records: int

    def words(self) -> Public:
        return {
            "attempt": self.number,
            "sites": list(self.sites),
            "share": self.share,
            "batch": self.batch,
            "records": self.records,
        }

    @staticmethod
    def of(words: Public) -> Attempt:
        """
        Raises:
            ValueError: they are no attempt's.
        """
        match words:
            case {
                "attempt": int(number),
                "sites": [*sites],
                "share": float(share),
                "batch": int() | float() as batch,
                "records": int(records),
            }:
                names = tuple(site for site in sites if isinstance(site, str))
                good = not any(isinstance(value, bool) for value in (number, records, batch))
                good &= len(words) == 5 and len(names) == len(sites) <= MOST_SITES and list(names) == sorted(set(names))
                good &= 1 <= number <= MOST_ATTEMPTS and 1 <= records <= MOST_ALTOGETHER and 0 < batch <= MOST_ALTOGETHER
                if good and 0 < share < math.inf:
                    return Attempt(number, names, share, float(batch), records)
        raise ValueError("not the words of an attempt")


def share_for(needed: float, sites: int, colluders: int) -> float:
    """s with which ``sites`` sites, less ``colluders`` that add no noise, reach the noise multiplier ``needed`` together."""
    return needed / math.sqrt(sites - colluders) * SLACK


class SecureSum(Transport):
    """The transport of ``trust = "secure-sum"``; its releases are one local step's."""

    name = "secure-sum"
    hides_updates = True
    dtype = np.uint64

    def least_sites(self, settings: Settings) -> int:
        return settings.colluders + 1

    def words(self, attempt: int, sites: Sequence[Profile], settings: Settings) -> Public:
        if len(sites) < (least := self.least_sites(settings)):
            raise RunFailed(
                f"trust = 'secure-sum': needs {least} sites with colluders = {settings.colluders}, but {len(sites)} can be asked"
            )
        if nameless := [str(profile.site) for profile in sites if not profile.name]:
            raise RunFailed(
                f"trust = 'secure-sum': sites {', '.join(nameless)} have no key to sum with: their node-config must name "
                "sharing-key and sharing-roster (docs/secure_sum.md)"
            )
        if len({profile.name for profile in sites}) < len(sites):
            raise RunFailed("trust = 'secure-sum': two sites have the same name, so they share one key; each needs its own")
        mechanisms = [mechanism_for(settings, profile.records) for profile in sites]
        needed = max(mechanism.noise_multiplier for mechanism in mechanisms)
        return Attempt(
            attempt,
            tuple(sorted(profile.name for profile in sites)),
            share_for(needed, len(sites), settings.colluders),
            sum(mechanism.expected_batch for mechanism in mechanisms),
            sum(profile.records for profile in sites),
        ).words()

    def attempt(self, exchange: Exchange) -> int:
        return Attempt.of(exchange.words).number

    def noise(self, exchange: Exchange) -> float:
        attempt = Attempt.of(exchange.words)
        return share_of(attempt, exchange.clip_norm).std * math.sqrt(len(attempt.sites)) / attempt.batch

    def accepts(self, words: Public) -> bool:
        try:
            Attempt.of(words)
        except ValueError:
            return False
        return True

    def released(
        self, total: PrivateSum, ledger: Ledger, source: RandomSource, exchange: Exchange, kept: Mask = frozenset()
    ) -> dict[str, Tensor]:
        return total.release_share(ledger, source, share_of(Attempt.of(exchange.words), exchange.clip_norm), kept)

    def pack(self, tensors: Packed, sender: Sender, exchange: Exchange) -> Packed:
        attempt = Attempt.of(exchange.words)
        if sender.secrets is None:
            raise SiteRefusal("sharing: the site has no key to sum with")
        bound = {
            "round": exchange.server_round,
            "attempt": attempt.number,
            "share": attempt.share.hex(),
            "clip-norm": exchange.clip_norm.hex(),
        }
        units = {name: np.asarray(value, dtype=np.int64) for name, value in tensors.items()}
        return masked(units, sender.secrets, sender.secrets.roster.only(attempt.sites), bound)

    def unpack(self, replies: Mapping[int, Packed], exchange: Exchange) -> Updates:
        """The sum, as ``count`` times the mean gradient.

        Raises:
            BadReply: a site is missing, or the sum is none that honest sites can have.
        """
        attempt = Attempt.of(exchange.words)
        count = len(attempt.sites)
        if len(replies) != count:
            raise BadReply("a site is missing, and with it what cancels the masks of the others")
        share = share_of(attempt, exchange.clip_norm)
        most = exchange.clip_norm * attempt.records + FAR * share.std * math.sqrt(count)
        totals: dict[str, NDArray[np.float64]] = {}
        for name in next(iter(replies.values())):
            units = np.sum([reply[name] for reply in replies.values()], axis=0, dtype=np.uint64)  # modulo 2^64
            total = np.asarray(units.view(np.int64) * share.step, dtype=np.float64)
            if not (np.abs(total) <= most).all():
                raise BadReply("the sum is none that these sites can have: one sent something else, or has another roster or key")
            totals[name] = np.asarray(total * (count / attempt.batch), dtype=np.float64)
        return Updates(totals, count)


def share_of(attempt: Attempt, clip_norm: float) -> Share:
    """
    Raises:
        ValueError: these are no numbers of a share.
    """
    return Share(attempt.share, clip_norm, len(attempt.sites))


SECURE_SUM = SecureSum()
