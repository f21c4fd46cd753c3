"""What a round's updates say, as fields of its line of metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

IF_SET = {"if-set": True}  # the field is in the file only if it says something
SIGNAL = {"if-set": True, "signal": True}  # likewise, and stands behind the others


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What a round's released updates say; `lalora_flwr.server.signals` has the formulas. None: there is no such thing.

    Attributes:
        snr, snr_A, snr_B: signal over noise of the mean update, without the energy that its noise is expected to have, so that it
            is 0 in the mean of pure noise and now and then below.
        cosine_A, cosine_B: how alike the sites' updates are.
        coupling, cross_term: how what A's move does to the product meets what B's does, and what comes of both.
        aggregation_bias: how far the mean of the products is from the product of the means.
    """

    snr: float | None = field(default=None, metadata=SIGNAL)
    snr_A: float | None = field(default=None, metadata=SIGNAL)
    snr_B: float | None = field(default=None, metadata=SIGNAL)
    cosine_A: float | None = field(default=None, metadata=SIGNAL)
    cosine_B: float | None = field(default=None, metadata=SIGNAL)
    coupling: float | None = field(default=None, metadata=SIGNAL)
    cross_term: float | None = field(default=None, metadata=SIGNAL)
    aggregation_bias: float | None = field(default=None, metadata=SIGNAL)
