"""What this process composed, and what a folder holds of others': each history goes on from the nearest one known."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

from lalora_flwr.privacy.composition.history import Composition, Steps, composition
from lalora_flwr.privacy.composition.store import Store
from lalora_flwr.privacy.events import SampledGaussian

_MOST_RECENT = 8  # compositions of several pairs kept in memory
_MOST_RESULTS = 1024


class Compositions:
    """ε of histories; each composition goes on from the nearest one known.

    Guarantee: an upper bound on ε at δ, for one record added to or removed from the site, if each step included each record
    independently with its probability q and added N(0, σ²C²) to the clipped sum. It is at most about 0.1 % too large. How
    a history is cut and ordered makes no difference.
    """

    def __init__(self, cache: Path | None = None) -> None:
        """``cache``: a folder for this only, made when it is first needed; None keeps everything in memory."""
        self._store = None if cache is None else Store(cache)
        self._recent: OrderedDict[tuple[Steps, float], Composition] = OrderedDict()
        self._results: OrderedDict[tuple[Steps, float], float] = OrderedDict()

    def epsilon(self, history: Sequence[SampledGaussian], delta: float) -> float:
        """ε at δ of all steps; 0 for none; inf if a step had no noise.

        Raises:
            ValueError: if δ is not between 0 and 1, or some are not steps of the mechanism.
        """
        if not 0 < delta < 1:
            raise ValueError(f"δ = {delta}: not between 0 and 1")
        steps = _merged(history)
        if not steps:
            return 0.0
        if steps[0][0][0] == 0:  # sorted by σ
            return math.inf
        key = steps, delta
        if key in self._results:
            return self._results[key]
        composed = composition(steps, delta, self._bases(steps, delta))
        if len(steps) > 1:
            self._remember(composed)
        self._results[key] = epsilon = composed.epsilon()
        if len(self._results) > _MOST_RESULTS:
            self._results.popitem(last=False)
        return epsilon

    def _bases(self, steps: Steps, delta: float) -> Iterator[Composition]:
        """What one may go on from; a single pair is composed sooner than looked up."""
        if len(steps) == 1:
            return
        for (_, known_delta), composed in reversed(self._recent.items()):
            if known_delta == delta:
                yield composed
        if self._store is not None:
            yield from self._store.bases(delta)

    def _remember(self, composed: Composition) -> None:
        self._recent[composed.steps, composed.delta] = composed
        if len(self._recent) > _MOST_RECENT:
            self._recent.popitem(last=False)
        if self._store is not None:
            self._store.put(composed)


def _merged(history: Sequence[SampledGaussian]) -> Steps:
    counts: dict[tuple[float, float], int] = {}
    for event in history:
        SampledGaussian(*event).check()
        sigma, q, steps = event
        if steps:
            pair = float(sigma), float(q)
            counts[pair] = counts.get(pair, 0) + int(steps)
    return tuple(sorted(counts.items()))
