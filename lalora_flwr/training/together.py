"""Several virtual sites in one pass of the frozen model, each record meeting its own site's values.

Sites of one process differ in a few small tensors over one frozen model. A small batch leaves most of a processor idle, so
that ten sites of ten records cost less in one pass of a hundred than in ten of ten. Each site runs its own round as if it
were alone (`lalora_flwr.ground.meeting`), with its own values, batch, clip, noise, filter and ledger; the passes are shared.

Guarantee: simulations only, and the same bits as one site after the other. What a product of matrices gives a row can depend
on how many rows there are, mostly where they are few: `fewest_alike` finds out before training, on made-up records, from how many
records of a site on it does not, and passes of fewer go alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lalora_flwr.adapter.form import Adapter
from lalora_flwr.data.inputs import Inputs, rows
from lalora_flwr.training.learner import Learner

log = logging.getLogger("lalora_flwr.site")
Gradients = tuple[dict[str, Tensor], Tensor]  # as `Learner.gradients` gives them
MOST_RECORDS = 128  # in one pass
SLOW = 0.5  # seconds of a pass from which on a processor is busy enough, and larger ones would need much memory
GAIN = 0.95  # of the time that a record takes in a pass of one site
SMALL = (1, 2, 3, 4, 5, 6, 8)  # records of a site with which kernels may do otherwise


class Apart(Adapter):
    """One site's own values of an adapter whose model is another's."""

    def __init__(self, whole: Adapter) -> None:
        """``whole``: of which the values are copied."""
        own = {slot: nn.Parameter(whole.parameters[name].detach().clone()) for name, slot in whole.layout.items()}
        super().__init__(whole.model, own)


@dataclass(frozen=True)
class Pass:
    """A site's batch that waits for its gradients: over the model of ``whole``, with the values of ``adapter``."""

    whole: Learner
    adapter: Adapter
    inputs: Inputs
    labels: Tensor

    @property
    def active(self) -> frozenset[str]:
        return frozenset(name for name, value in self.adapter.parameters.items() if value.requires_grad)

    def joins(self) -> object:
        """Passes with equal ones can be taken together."""
        shapes = tuple(value.shape for value in self.adapter.parameters.values())
        inputs = self.inputs.items() if isinstance(self.inputs, dict) else [("", self.inputs)]
        kinds = tuple((name, value.shape[1:], value.dtype) for name, value in inputs)
        return id(self.whole), self.active, shapes, kinds, self.labels.shape[1:], self.labels.dtype


@dataclass(frozen=True)
class SiteLearner(Learner):
    """A learner with one site's own values, whose passes over the model of ``whole`` are taken by ``ask``."""

    whole: Learner
    ask: Callable[[Pass], Gradients]

    def gradients(self, inputs: Inputs, labels: Tensor) -> Gradients:
        return self.ask(Pass(self.whole, self.adapter, inputs, labels))


def site_learner(whole: Learner, ask: Callable[[Pass], Gradients]) -> SiteLearner:
    """A learner for one site, over the frozen model of ``whole``."""
    return SiteLearner(whole.base, Apart(whole.adapter), whole.engine, whole.initial, whole, ask)


def taken(passes: Sequence[Pass], fewest: int) -> list[Callable[[], Gradients]]:
    """The gradients of every pass, in their order, each as a function that gives them or raises what went wrong.

    Args:
        passes: of different sites. The values in the models that they are over are lost.
        fewest: records of a site from which on its pass may go with others.
    """
    found: dict[int, Callable[[], Gradients]] = {}
    groups: dict[object, list[int]] = {}
    for place, one in enumerate(passes):
        key = one.joins() if len(one.labels) >= fewest else place
        groups.setdefault(key, []).append(place)
    for places in groups.values():
        for part in _of_size([(place, len(passes[place].labels)) for place in places]):
            found |= zip(part, _group([passes[place] for place in part]), strict=True)
    return [found[place] for place in range(len(passes))]


def _of_size(places: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Places with their records, cut into groups of at most `MOST_RECORDS`, or of one."""
    groups: list[list[int]] = []
    held = MOST_RECORDS
    for place, records in places:
        if held + records > MOST_RECORDS:
            groups.append([])
            held = 0
        groups[-1].append(place)
        held += records
    return groups


def _group(passes: Sequence[Pass]) -> list[Callable[[], Gradients]]:
    if len(passes) > 1:
        try:
            return [_given(found) for found in _at_once(passes)]
        except Exception:
            log.debug("sites are taken one by one", exc_info=True)  # the fault is one site's: alone, it is raised there
    return [_told(one) for one in passes]


def _told(one: Pass) -> Callable[[], Gradients]:
    """What the pass alone gives, taken now: what it raises is raised when it is asked for."""
    try:
        return _given(_alone(one))
    except Exception as fault:
        return _raised(fault)


def _given(found: Gradients) -> Callable[[], Gradients]:
    return lambda: found


def _raised(fault: Exception) -> Callable[[], Gradients]:
    def again() -> Gradients:
        raise fault

    return again


def _alone(one: Pass) -> Gradients:
    whole = one.whole
    whole.adapter.load({name: value.detach() for name, value in one.adapter.parameters.items()})
    whole.adapter.activate(one.active)
    return whole.gradients(one.inputs, one.labels)


def _at_once(passes: Sequence[Pass]) -> list[Gradients]:
    """One pass over the records of all.

    Raises:
        RuntimeError: a tensor that only the server changes is not every site's alike.
    """
    whole = passes[0].whole
    whole.adapter.activate(passes[0].active)
    counts, values = [len(one.labels) for one in passes], {}
    for name, slot in whole.adapter.layout.items():
        own = [one.adapter.parameters[name].detach() for one in passes]
        if not slot.frozen:
            values[name] = torch.stack(own)
            continue
        if not all(torch.equal(own[0], other) for other in own[1:]):
            raise RuntimeError(f"{name}: sites hold different values")
        whole.adapter.load({name: own[0]})
    inputs, labels = joined([one.inputs for one in passes]), torch.cat([one.labels for one in passes])
    seen: list[Tensor] = []

    def losses() -> Tensor:
        seen.append(whole.adapter.losses(whole.base, inputs, labels))
        return seen[-1]

    gradients = whole.engine(len(labels), losses, whole.engine.owned(counts, values))
    by_site = {name: torch.split(value, counts) for name, value in gradients.items()}
    of_losses = torch.split(seen[-1].detach(), counts)
    return [({name: by_site[name][place] for name in by_site}, of_losses[place]) for place in range(len(passes))]


def joined(inputs: Sequence[Inputs]) -> Inputs:
    """The inputs of batches one after the other."""
    first = inputs[0]
    if isinstance(first, dict):
        return {name: torch.cat([one[name] for one in inputs if isinstance(one, dict)]) for name in first}
    return torch.cat([one for one in inputs if isinstance(one, Tensor)])


@dataclass(frozen=True)
class Company:
    """How many sites' passes are taken together, at most, and from how many records of a site on."""

    sites: int
    fewest: int


ALONE = Company(1, 1)


def company(whole: Learner, batch: float, clock: Callable[[], float] = time.perf_counter) -> Company:
    """How many sites are worth one pass, by the time that a record takes; one, where the bits would not be the same.

    Args:
        whole: of which the values are lost.
        batch: records that a site's pass is expected to have.
        clock: seconds.
    """
    if whole.adapter.device.type != "cpu":  # its kernels order their sums as they like
        return ALONE
    size = max(1, round(batch))
    generator = torch.Generator().manual_seed(0)
    if 2 * size > MOST_RECORDS:
        return ALONE
    count = max(MOST_RECORDS, 5 * size)
    inputs, labels = whole.base.synthetic_batch(count, generator)
    whole.adapter.model.train()
    whole.adapter.load(whole.initial)
    sites = [_stirred(whole.adapter, generator) for _ in range(max(3, MOST_RECORDS // size))]  # frozen slots alike, as in a round

    def passes(sizes: Sequence[int]) -> list[Pass]:
        found, first = [], 0
        for site, records in zip(sites, sizes, strict=False):
            found.append(Pass(whole, site, rows(inputs, slice(first, first + records)), labels[first : first + records]))
            first += records
        return found

    def seconds(number: int) -> float:
        """Of one record, the fastest of three passes of so many sites."""
        times = []
        for _ in range(3):
            begun = clock()
            _at_once(passes([size] * number))
            times.append(clock() - begun)
        return min(times) / (number * size)

    one = seconds(1)
    best = min(MOST_RECORDS // size, int(SLOW / (one * size)))
    if best < 2 or seconds(best) > GAIN * one:
        return ALONE
    sizes = sorted({*SMALL, max(1, size // 2), max(1, size - 1), size, size + 1, size + 3, 3 * size // 2, 2 * size})
    fewest = fewest_alike(passes, [records for records in sizes if 2 * records + size <= count], size)
    return Company(best, fewest) if fewest <= size else ALONE  # else too few passes would go together


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
        ends = zip(made[::2], _at_once(made)[::2], strict=True)
        if not all(_equal(_alone(one), found) for one, found in ends):
            break
        fewest = records
    return fewest


def _equal(one: Gradients, other: Gradients) -> bool:
    return torch.equal(one[1], other[1]) and all(torch.equal(one[0][name], other[0][name]) for name in one[0])


def _stirred(whole: Adapter, generator: torch.Generator) -> Adapter:
    """A site's values that differ from all others', all slots that may train active."""
    site = Apart(whole)
    with torch.no_grad():
        for name, value in site.parameters.items():
            if whole.layout[name].frozen:
                continue
            value.add_(0.02 * torch.randn(value.shape, generator=generator).to(value))
    site.activate(whole.trainable)
    return site
