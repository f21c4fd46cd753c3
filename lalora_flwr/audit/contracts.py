"""What every release has to keep, looked at directly: each check one sentence, with false alarms rarer than one in a million."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binom, chi2
from torch import Tensor

from lalora_flwr.audit.observer import Step, Watched
from lalora_flwr.privacy.counting import RunLedger
from lalora_flwr.privacy.events import Target
from lalora_flwr.privacy.mechanism import LARGEST, Mechanism
from lalora_flwr.training.local import MakeSum

RARE = 1e-7  # chance of a false alarm
GRID = 2.0**-16  # of C and of the noise: what two roundings to the grid, and to float32, may add to an entry
EXTREME = (1e-30, 1e30)  # values of C at which squares leave float32
LENGTHS = (1e-45, 1e-30, 1e-20, 1e-9, 0.5, 1.0, 1.5, 1e9, 1e20, 1e38)  # of a record's gradient, over its entries


@dataclass(frozen=True)
class Check:
    """A contract, and what is wrong with it; empty if nothing is."""

    name: str
    fault: str = ""


def checks(sites: Sequence[Watched], make_sum: MakeSum, *, by_replay: str, stopped: str) -> Iterator[Check]:
    """All checks.

    Args:
        sites: after the run.
        make_sum: of the run's sums.
        by_replay: what is wrong with replies, of `lalora_flwr.audit.replay`.
        stopped: why the run stopped before its end.
    """
    steps = [step for site in sites for step in site.steps]
    mechanism = steps[0].mechanism
    yield Check("a record moves the sum by C at most", _found(lambda: shift(make_sum, mechanism)))
    yield Check("noise has its full deviation", deviation(steps))
    yield Check("an empty batch is noised and counted", _found(lambda: empty(make_sum, mechanism)))
    yield Check("a sum is let out once, after it was counted", _found(lambda: once(make_sum, mechanism)))
    yield Check("records join a step independently, with probability q", sampling(sites))
    yield Check("no noise is drawn twice", reuse(steps))
    yield Check("a reply is made of releases alone", by_replay)
    yield Check("the server takes the replies", stopped)


def _found(check: Callable[[], str]) -> str:
    """What a check of a sum finds; a sum that fails in it has not kept the contract."""
    try:
        return check()
    except Exception as fault:
        return f"{type(fault).__name__}: {' '.join(str(fault).split())}"


class _Still:
    """Draws zeros: what is let out then is the sum."""

    seeded = True

    def normal(self, shape: torch.Size) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    def uniform(self, n: int) -> Tensor:
        return torch.zeros(n, dtype=torch.float64)


def shapes_of(mechanism: Mechanism) -> dict[str, torch.Size]:
    """Two tensors, of which one is clipped apart if the mechanism does so."""
    return {"one": torch.Size([3, 4]), mechanism.apart or "two": torch.Size([5])}


def shift(make_sum: MakeSum, mechanism: Mechanism) -> str:
    """One record more, of any length, alone and beside others, moves what is let out without its noise by C at most."""
    found = (_shift(make_sum, dataclasses.replace(mechanism, clip_norm=C)) for C in (mechanism.clip_norm, *EXTREME))
    return next((fault for fault in found if fault), "")


def _shift(make_sum: MakeSum, mechanism: Mechanism) -> str:
    generator = torch.Generator().manual_seed(0)
    shapes = shapes_of(mechanism)
    rounding = GRID * (1 + mechanism.noise_multiplier) * math.sqrt(sum(shape.numel() for shape in shapes.values()))
    for others in (0, 3):
        beside = {name: torch.randn(others, *shape, generator=generator) for name, shape in shapes.items()}
        before = _let_out(make_sum, mechanism, [beside] if others else [])
        for length in (*LENGTHS, math.inf, math.nan):
            unit = mechanism.clip_norm if 1e-9 <= length <= 1e9 else 1.0
            entry = min(length * unit, LARGEST) if math.isfinite(length) else length
            record = {name: torch.full((1, *shape), entry) for name, shape in shapes.items()}
            joined = {name: torch.cat([beside[name], record[name]]) for name in shapes}
            for batches in ([joined], [beside, record] if others else [record]):
                moved = float((_let_out(make_sum, mechanism, batches) - before).norm()) / mechanism.clip_norm
                if not moved <= 1 + rounding:
                    return f"a gradient of entries {entry:g} moves the sum by {moved:.4g} C, C = {mechanism.clip_norm:g}"
    return ""


def _let_out(make_sum: MakeSum, mechanism: Mechanism, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """The sum over batches, in one row."""
    shapes = shapes_of(mechanism)
    total = make_sum(mechanism, shapes, torch.device("cpu"))
    for batch in batches:
        total.add({name: value.clone() for name, value in batch.items()})
    released = total.release(_ledger(mechanism), _Still())
    return torch.cat([released[name].flatten().double() for name in shapes]) * mechanism.expected_batch


def _ledger(mechanism: Mechanism, steps: int = 1) -> RunLedger:
    ledger = RunLedger(Target(math.inf, 1e-5, steps, "rdp"))
    ledger.reserve(mechanism.noise_multiplier, mechanism.sample_rate, steps)
    return ledger


class _Counting(_Still):
    """Draws ones, and counts them."""

    def __init__(self) -> None:
        self.draws = 0

    def normal(self, shape: torch.Size) -> Tensor:
        self.draws += math.prod(shape)
        return torch.ones(shape, dtype=torch.float64)


def empty(make_sum: MakeSum, mechanism: Mechanism) -> str:
    """A step whose batch is empty lets out noise as any other, and takes a step of the ledger."""
    source, ledger = _Counting(), _ledger(mechanism)
    shapes = shapes_of(mechanism)
    released = make_sum(mechanism, shapes, torch.device("cpu")).release(ledger, source)
    if released.keys() != shapes.keys() or any(not value.any() for value in released.values()):
        return "a step without records lets out no noise"
    return "a step without records is not counted" if ledger.left else ""


def once(make_sum: MakeSum, mechanism: Mechanism) -> str:
    """Without a step left nothing is let out, and a second release holds nothing."""
    shapes = shapes_of(mechanism)
    total = make_sum(mechanism, shapes, torch.device("cpu"))
    total.add({name: torch.ones(2, *shape) for name, shape in shapes.items()})
    ledger = _ledger(mechanism)
    ledger.take_step()
    try:
        total.release(ledger, _Still())
        return "a sum is let out though no step is left"
    except Exception:
        pass
    total.release(_ledger(mechanism), _Still())
    again = total.release(_ledger(mechanism), _Still())
    return "a sum is let out a second time" if any(value.any() for value in again.values()) else ""


def deviation(steps: Sequence[Step]) -> str:
    """Entries on which no canary lies vary by the noise that they are to have."""
    for step in steps:  # of one alone: a step without noise must not hide among the others
        entries, spread = len(step.rest), float((step.rest**2).sum()) / step.noise**2
        if entries > 1 and spread < chi2.ppf(RARE / len(steps), entries):
            return f"a release varies by {math.sqrt(spread / entries):.3f} of the deviation that it is to have"
    entries = sum(len(step.rest) for step in steps)
    spread = sum(float((step.rest**2).sum()) / step.noise**2 for step in steps)
    if entries > 1 and spread < chi2.ppf(RARE, entries):
        return f"releases vary by {math.sqrt(spread / entries):.4f} of the deviation that they are to have"
    return ""


def sampling(sites: Sequence[Watched]) -> str:
    """How often records are drawn, how large batches are, and how often the same record is drawn twice in a row."""
    for site in sites:
        records = site.canaries.records
        for step in site.steps:
            q, size = step.mechanism.sample_rate, len(step.drawn)
            own = [label for label in step.drawn if label >= 0]
            if len(set(own)) < len(own):
                return "a record takes part in a step twice"
            if min(binom.cdf(size, records, q), binom.sf(size - 1, records, q)) < RARE / 100:
                return f"a batch of {size} out of {records} records at q = {q:.4g}"
    return _dispersion(sites) or _overlaps(sites)


def _dispersion(sites: Sequence[Watched]) -> str:
    """Batches of a fixed size vary too little, drawn with a wrong q their mean is off."""
    total, variance, squares, count = 0.0, 0.0, 0.0, 0
    for site in sites:
        for step in site.steps:
            q, records = step.mechanism.sample_rate, site.canaries.records
            if q < 1:
                own = records * q * (1 - q)
                total, variance = total + len(step.drawn) - records * q, variance + own
                squares, count = squares + (len(step.drawn) - records * q) ** 2 / own, count + 1
    if not count:
        return ""
    if abs(total) > 5.5 * math.sqrt(variance):
        return f"records are drawn {total:+.0f} times more often than q says, in {count} steps"
    if squares < chi2.ppf(RARE, count):
        return f"sizes of batches vary by {math.sqrt(squares / count):.2f} of what independent draws would"
    return ""


def _overlaps(sites: Sequence[Watched]) -> str:
    """Consecutive steps share q² of the canaries."""
    found, mean, variance = 0, 0.0, 0.0
    for site in sites:
        inside = int(site.canaries.inside.sum())
        for one, other in itertools.pairwise(site.steps):
            both = one.mechanism.sample_rate * other.mechanism.sample_rate
            found += len({label for label in one.drawn if label >= 0} & set(other.drawn))
            mean, variance = mean + inside * both, variance + inside * both * (1 - both)
    if abs(found - mean) > 6 * math.sqrt(2 * variance) + 6:
        return f"consecutive steps have {found} canaries in common; independent ones would have {mean:.0f}"
    return ""


def reuse(steps: Sequence[Step]) -> str:
    """The noise of no two releases is alike."""
    alike: dict[int, list[np.ndarray]] = defaultdict(list)
    for step in steps:
        norm = float(np.linalg.norm(step.rest))
        if len(step.rest) >= 64 and norm:
            alike[len(step.rest)].append(step.rest / norm)
    for entries, rows in alike.items():
        matrix = np.stack(rows)
        correlation = np.abs(matrix @ matrix.T - np.eye(len(rows)))
        if float(correlation.max()) > min(0.99, 8 / math.sqrt(entries)):
            return f"two releases correlate by {float(correlation.max()):.2f}: their noise is not independent"
    return ""
