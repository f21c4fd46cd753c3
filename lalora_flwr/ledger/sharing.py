"""What a site's ledger has to know of a secure sum that it takes part in."""

from __future__ import annotations

import math
from dataclasses import dataclass

DIGITS = 3  # of a share as a dataset's sum holds it


def counted(share: float) -> float:
    """A share as it is composed, rounded down to `DIGITS` digits: a server that varies it cannot make the ledger long."""
    rounded = float(f"{share:.{DIGITS - 1}e}")
    if rounded > share:
        step = 10.0 ** (math.floor(math.log10(rounded)) - DIGITS + 1)
        rounded = float(f"{rounded - step:.{DIGITS - 1}e}")
    return rounded


@dataclass(frozen=True)
class Sharing:
    """A share of one noise.

    Attributes:
        attempt: its number within the round; a site never answers one twice, since its masks are good for one answer.
        share: the noise multiplier of the site's own part.
        sites: how many sum.
        colluders: how many of them the owner wants the guarantee to survive.
        roster: digest of the names and keys of those that sum.
        key: the site's own public key, base64: its masks belong to it, whichever ledger counts them.
    """

    attempt: int
    share: float
    sites: int
    colluders: int
    roster: str
    key: str
