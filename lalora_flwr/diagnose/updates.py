"""What a run's rounds said of their updates (`lalora_flwr.server.signals`), over the whole run, and what the rounds cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lalora_flwr.server.metrics import RoundMetrics

SURE = 3.0  # standard errors that a signal must be above zero, before anything is divided by it


@dataclass(frozen=True)
class Released:
    """Means over the rounds that have the number; None if none has.

    Attributes:
        snr, snr_A, snr_B: signal over noise of the mean update.
        cosine_A, cosine_B: between the sites' updates as they were released.
        clean_cosine_A, clean_cosine_B: of what is in them besides noise; None where the noise hides it.
        coupling, cross_term, aggregation_bias: of the round's moves.
    """

    snr: float | None
    snr_A: float | None
    snr_B: float | None
    cosine_A: float | None
    cosine_B: float | None
    clean_cosine_A: float | None
    clean_cosine_B: float | None
    coupling: float | None
    cross_term: float | None
    aggregation_bias: float | None


@dataclass(frozen=True)
class Cost:
    """Of a round.

    Attributes:
        seconds: median over the rounds.
        bytes_up, bytes_down: mean over the rounds, of all sites.
        peak_memory_mb: of the server's process by the end of the run; in the inline engine it is the sites' too.
    """

    seconds: float
    bytes_up: float
    bytes_down: float
    peak_memory_mb: float | None


def released(rounds: Sequence[RoundMetrics]) -> Released:
    """Over the rounds of a run."""
    return Released(
        snr=_mean(line.snr for line in rounds),
        snr_A=_mean(line.snr_A for line in rounds),
        snr_B=_mean(line.snr_B for line in rounds),
        cosine_A=_mean(line.cosine_A for line in rounds),
        cosine_B=_mean(line.cosine_B for line in rounds),
        clean_cosine_A=clean_cosine([(line.cosine_A, line.snr_A, line.sites) for line in rounds]),
        clean_cosine_B=clean_cosine([(line.cosine_B, line.snr_B, line.sites) for line in rounds]),
        coupling=_mean(line.coupling for line in rounds),
        cross_term=_mean(line.cross_term for line in rounds),
        aggregation_bias=_mean(line.aggregation_bias for line in rounds),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(known) if known else None


def clean_cosine(rounds: Iterable[tuple[float | None, float | None, int]]) -> float | None:
    """The cosine of the sites' updates without their noise, over all rounds together.

    Noise is independent between sites: it leaves the mean inner product of two updates as it is, and adds its energy to the mean
    squared length of one. In units of that energy, a round of n sites with cosine c and signal-to-noise ρ has the squared length
    x = (ρ + 1) / (1 + (n - 1) c) and the inner product c x; without noise the cosine is Σ c x / Σ (x - 1).

    Args:
        rounds: c, ρ and n of each; those that lack one are left out.

    Returns:
        None with fewer than two rounds, or if Σ (x - 1) is not `SURE` standard errors above zero: noise hides what there is.
    """
    inner, own = [], []
    for cosine, snr, sites in rounds:
        if cosine is not None and snr is not None and 1 + (sites - 1) * cosine > 0:
            x = (snr + 1) / (1 + (sites - 1) * cosine)
            if math.isfinite(cosine * x):  # a run that diverged, or a damaged file, has numbers that are not
                inner.append(cosine * x)
                own.append(x - 1)
    if len(own) < 2 or statistics.fmean(own) <= SURE * statistics.stdev(own) / math.sqrt(len(own)):
        return None
    return sum(inner) / sum(own)


def cost(rounds: Sequence[RoundMetrics], peak_of_run: float) -> Cost:
    """Of the rounds of a run; ``peak_of_run``: of its summary, for runs whose rounds do not say; 0: not known."""
    return Cost(
        seconds=statistics.median(line.seconds for line in rounds),
        bytes_up=statistics.fmean(line.bytes_up for line in rounds),
        bytes_down=statistics.fmean(line.bytes_down for line in rounds),
        peak_memory_mb=max((line.peak_memory_mb or 0.0 for line in rounds), default=0.0) or peak_of_run or None,
    )


def without_signals(rounds: Sequence[RoundMetrics]) -> bool:
    """Whether the lines hold no signal at all, as those of an older version."""
    return released(rounds) == Released(*[None] * 10)
