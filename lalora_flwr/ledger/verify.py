"""Verify a ledger from its entries alone: every hash, every sum, and every ε, twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lalora_flwr.ground.errors import LedgerError
from lalora_flwr.ledger.content import Content
from lalora_flwr.ledger.entries import Reserve, SharedReserve
from lalora_flwr.ledger.file import LedgerFile
from lalora_flwr.privacy.composition.composer import Composer
from lalora_flwr.privacy.counting import Compose

SAME = 1e-6  # relative difference in ε that other versions of numpy and scipy may make
ERROR = 0.02  # twice the error bound that PRV adds to its ε; PLD adds less
SECOND = {"pld": "rdp", "prv": "rdp", "rdp": "pld"}


@dataclass(frozen=True)
class Verified:
    """What a ledger without a fault holds.

    Attributes:
        content: its entries, hashes and sums.
        last: for each dataset its last reserve entry, and the ε of the second accountant there.
    """

    content: Content
    last: dict[str, tuple[Reserve, float]]


def verify(
    file: LedgerFile,
    head: str = "",
    compose: Compose | None = None,
    progress: Callable[[int, int], None] = lambda number, entries: None,
) -> Verified:
    """Check all of a ledger, from its first entry on; no checkpoint and nothing that was composed earlier is used.

    Guarantee: if it returns, every entry is the one whose hash stands there and follows the entry before it; each
    reserve's segments are the sum of all entries up to it; its ε is that of its segments and at most the cap it names;
    and RDP does not contradict it. With ``head``, a hash noted earlier, nothing up to there was taken away since; nor was
    anything that the file's witness saw, if it has one.

    Args:
        file: the ledger.
        head: a hash that must be among those of its entries.
        compose: makes ε of segments; default: the accountant.
        progress: told the number of each reserve entry before its ε is computed, which takes a moment, and of all entries.

    Raises:
        LedgerError: naming the first difference.
    """
    compose = compose or Composer()
    content = file.read(thorough=True)
    if head and head not in content.hashes:
        raise LedgerError(f"{file.path}: the noted hash is not among its hashes; entries were taken away or it is another ledger")
    last: dict[str, tuple[Reserve, float]] = {}
    for number, entry in enumerate(content.entries):
        if isinstance(entry, Reserve):
            progress(number, len(content.entries))
            try:
                last[entry.dataset] = entry, _check_epsilon(entry, compose)
            except LedgerError as error:
                raise LedgerError(f"{file.path}: entry {number}: {error}") from None
    return Verified(content, last)


def _check_epsilon(entry: Reserve, compose: Compose) -> float:
    """ε by the second accountant, after both checks.

    All accountants give upper bounds, and PLD and PRV are tight up to their error: RDP cannot be below them. RDP can be
    far above only where few steps meet a tiny sample rate, so only a gross difference in that direction is a fault.
    """
    if entry.accountant not in SECOND:
        raise LedgerError(f"unknown accountant {entry.accountant}")
    if not entry.epsilon <= entry.max_epsilon:
        raise LedgerError(f"epsilon {entry.epsilon:g} is above the cap {entry.max_epsilon:g} it was held to")
    names = entry.accountant, SECOND[entry.accountant]
    first, second = (compose(entry.segments, entry.delta, name) for name in names)
    if not math.isclose(first, entry.epsilon, rel_tol=SAME):
        raise LedgerError(f"its epsilon is {entry.epsilon!r}, but its steps cost {first!r}")
    if isinstance(entry, SharedReserve):
        alone = compose(entry.alone, entry.delta, names[0])
        if not math.isclose(alone, entry.alone_epsilon, rel_tol=SAME):
            raise LedgerError(f"its epsilon without the others' noise is {entry.alone_epsilon!r}, but its steps cost {alone!r}")
    tight, rdp = (second, first) if entry.accountant == "rdp" else (first, second)
    if not tight - ERROR <= rdp <= 3 * tight + 20:
        raise LedgerError(f"the accountants contradict each other: {names[0].upper()} {first:g}, {names[1].upper()} {second:g}")
    return second
