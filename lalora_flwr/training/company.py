"""Before training: how many sites are worth one pass, and what that does to the bits of their gradients."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lalora_flwr.adapter.form import Adapter
from lalora_flwr.data.inputs import Inputs, rows, to_device
from lalora_flwr.gradients.precision import full_precision
from lalora_flwr.gradients.self_check import ROUNDING, TOLERANCE
from lalora_flwr.training.learner import Learner
from lalora_flwr.training.together import ALONE, MOST_RECORDS, Apart, Company, Gradients, Pass, alone, at_once

log = logging.getLogger(__name__)
MOST_ON_GPU = 1024  # records in one pass
ROOM = 1.25  # times the records that are expected: Poisson batches are larger at times
SLOW = 0.5  # seconds of a pass from which on a processor is busy enough, and larger ones would need much memory
GAIN = 0.95  # of the time that a record takes in a pass of fewer sites
SMALL = (1, 2, 3, 4, 5, 6, 8)  # records of a site with which kernels may do otherwise
Clock = Callable[[], float]


def company(whole: Learner, batch: float, rounding: bool = False, clock: Clock | None = None) -> Company:
    """How many sites are worth one pass, by the time that a record takes; one, where gradients would not be the same.

    Guarantee: without ``rounding`` made-up records have the same bits in company as alone, for every number of records of a
    site that was tried. With it, each one's gradient of each tensor, in float32, is that alone up to `TOLERANCE` of its norm (as
    the check before training has it), whatever else is in the pass.

    Args:
        whole: of which the values are lost.
        batch: records that a site's pass is expected to have.
        rounding: whether gradients may differ by rounding.
        clock: seconds; default: of the process, which other work on the machine does not lengthen, or with a GPU of the day.
    """
    size = max(1, round(batch))
    on_gpu = whole.adapter.device.type != "cpu"
    clock = clock or (time.perf_counter if on_gpu else time.process_time)
    whole.adapter.model.train()
    whole.adapter.load(whole.initial)
    if rounding:
        return _within_rounding(whole, size, clock)
    if on_gpu or 2 * size > MOST_RECORDS:  # a GPU's kernels order their sums as they like
        return ALONE
    return _to_the_bit(whole, size, clock)


def _to_the_bit(whole: Learner, size: int, clock: Clock) -> Company:
    count = max(MOST_RECORDS, 5 * size)
    made_up = _MadeUp(whole, count, max(3, MOST_RECORDS // size))
    one = made_up.seconds(1, size, clock)
    best = min(MOST_RECORDS // size, math.floor(SLOW / max(one * size, 1e-9)))
    if best < 2 or made_up.seconds(best, size, clock) > GAIN * one:
        return ALONE
    sizes = sorted({*SMALL, max(1, size // 2), max(1, size - 1), size, size + 1, size + 3, 3 * size // 2, 2 * size})
    fewest = fewest_alike(made_up.passes, [records for records in sizes if 2 * records + size <= count], size)
    return Company(best, fewest) if fewest <= size else ALONE  # else too few passes would go together


def _within_rounding(whole: Learner, size: int, clock: Clock) -> Company:
    """As many sites as a record's time falls with, doubled until it does no longer, or memory ends."""
    on_gpu = whole.adapter.device.type != "cpu"
    limit = (MOST_ON_GPU if on_gpu else MOST_RECORDS) // size
    best, fastest = 1, math.inf
    try:
        made_up = _MadeUp(whole, max(16, 2 * size), 3)
        if limit < 2 or not _agree(whole, made_up, size, by_record=on_gpu):
            return ALONE
        for sites in [2**power for power in range(limit.bit_length())]:
            if sites > 1 and not on_gpu and sites * size * fastest > SLOW:
                break
            found = made_up.seconds(sites, size, clock, by_record=on_gpu)
            if found > GAIN * fastest:
                break
            best, fastest = sites, found
    except torch.OutOfMemoryError:
        log.info("a pass of %d sites is the largest that memory has room for", best)
    if best == 1:
        return ALONE
    return Company(best, 1, math.ceil(ROOM * best * size), rounding=True, by_record=on_gpu)


class _MadeUp:
    """Made-up records of made-up sites."""

    def __init__(self, whole: Learner, count: int, sites: int) -> None:
        generator = torch.Generator().manual_seed(0)
        inputs, labels = whole.base.synthetic_batch(count, generator)
        self._whole, self._device = whole, whole.adapter.device
        self._inputs: Inputs = to_device(inputs, self._device)
        self._labels = labels.to(self._device)
        self._sites = [stirred(whole.adapter, generator) for _ in range(sites)]  # frozen slots alike, as in a round

    def passes(self, sizes: Sequence[int]) -> list[Pass]:
        """Of so many records each, of different sites and records as far as there are enough."""
        found, first = [], 0
        for place, records in enumerate(sizes):
            chosen = torch.arange(first, first + records, device=self._device) % len(self._labels)
            site = self._sites[place % len(self._sites)]
            found.append(Pass(self._whole, site, rows(self._inputs, chosen), self._labels[chosen]))
            first += records
        return found

    def seconds(self, sites: int, size: int, clock: Clock, *, by_record: bool = False) -> float:
        """Of one record, the fastest of three passes of so many sites."""
        times, passes = [], self.passes([size] * sites)
        for _ in range(3):
            begun = clock()
            at_once(passes, by_record=by_record)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            times.append(clock() - begun)
        return min(times) / (sites * size)


def _agree(whole: Learner, made_up: _MadeUp, size: int, *, by_record: bool) -> bool:
    """Whether gradients in company are those alone up to rounding; made-up texts are of different lengths."""
    generator = torch.Generator().manual_seed(1)
    device = whole.adapter.device
    checks = [(to_device(inputs, device), labels.to(device)) for inputs, labels in whole.base.check_batches(generator)]
    of_all_lengths = [Pass(whole, stirred(whole.adapter, generator), inputs, labels) for inputs, labels in checks]
    with full_precision(whole.adapter.model):
        for passes in (made_up.passes([1, size, 3]), [*of_all_lengths, *made_up.passes([1])]):
            for one, found in zip(passes, at_once(passes, by_record=by_record), strict=True):
                if fault := _fault(alone(one), found):
                    log.warning("sites do not share passes: %s differs from that of a site alone by more than rounding", fault)
                    return False
    return True


def _fault(wanted: Gradients, found: Gradients) -> str:
    """What differs by more than rounding; empty if nothing does."""
    if not torch.allclose(wanted[1], found[1], rtol=TOLERANCE, atol=ROUNDING):
        return "the loss"
    for name, value in wanted[0].items():
        sizes = _norms(value)
        allowed = TOLERANCE * sizes + ROUNDING * sizes.max()
        if not bool((_norms(found[0][name] - value) <= allowed).all()):  # NaN compares as false
            return f"the gradient of {name}"
    return ""


def _norms(values: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values.double().flatten(1), dim=1)
    return norms


def fewest_alike(passes: Callable[[Sequence[int]], list[Pass]], sizes: Sequence[int], other: int) -> int:
    """The fewest records of a site, of the sizes given, from which on a pass together gives the bits that one alone gives.

    Args:
        passes: makes passes of different sites, of so many records each.
        sizes: ascending.
        other: records of the site between two of each size.
    """
    fewest = sizes[-1] + 1
    for records in reversed(sizes):
        made = passes([records, other, records])
        ends = zip(made[::2], at_once(made)[::2], strict=True)
        if not all(_equal(alone(one), found) for one, found in ends):
            break
        fewest = records
    return fewest


def _equal(one: Gradients, other: Gradients) -> bool:
    return torch.equal(one[1], other[1]) and all(torch.equal(one[0][name], other[0][name]) for name in one[0])


def stirred(whole: Adapter, generator: torch.Generator) -> Adapter:
    """A site's values that differ from all others', all slots that may train active."""
    site = Apart(whole)
    with torch.no_grad():
        for name, value in site.parameters.items():
            if whole.layout[name].frozen:
                continue
            value.add_(0.02 * torch.randn(value.shape, generator=generator).to(value))
    site.activate(whole.trainable)
    return site
