"""Several virtual sites in one pass of the frozen model, each record meeting its own site's values.

Sites of one process differ in a few small tensors over one frozen model. A small batch leaves most of a processor idle, so
that ten sites of ten records cost less in one pass of a hundred than in ten of ten. Each site runs its own round as if it
were alone (`lalora_flwr.ground.meeting`), with its own values, batch, clip, noise, filter and ledger; the passes are shared.

Simulations only. What a product of matrices gives a row can depend on how many rows there are, mostly where they are few:
`lalora_flwr.training.company` finds out before training, on made-up records, which passes are worth sharing and what that
does to the bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lalora_flwr.adapter.form import Adapter
from lalora_flwr.data.inputs import Inputs
from lalora_flwr.training.learner import Learner

log = logging.getLogger("lalora_flwr.site")
Gradients = tuple[dict[str, Tensor], Tensor]  # as `Learner.gradients` gives them
WORTH_IT = 200  # steps of all sites in a run that is long enough to find out
MOST_RECORDS = 128  # in one pass on a processor; more are not faster, and would need memory


@dataclass(frozen=True)
class Company:
    """Which passes are taken together.

    Attributes:
        sites: how many, at most.
        fewest: records of a site from which on its pass goes with others.
        most: records of a pass of several sites, at most.
        rounding: gradients may differ from those alone by rounding; texts of different lengths meet then, filled up to the
            longest.
        by_record: as `Owners` has it; only with ``rounding``.
    """

    sites: int
    fewest: int
    most: int = MOST_RECORDS
    rounding: bool = False
    by_record: bool = False


ALONE = Company(1, 1)


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

    @property
    def tokens(self) -> int:
        """As `BaseModel.tokens` has it."""
        return self.whole.base.tokens(self.inputs)

    def joins(self, *, filled_up: bool = False) -> object:
        """Passes with equal ones can be taken together; ``filled_up``: after `of_length` has made them equally long."""
        values = tuple(value.shape for value in self.adapter.parameters.values())
        inputs = self.inputs if isinstance(self.inputs, dict) else {"": self.inputs}
        tensors = {**inputs, "label": self.labels}
        short = filled_up and self.tokens > 0
        kinds = tuple((name, value.dim() if short else value.shape[1:], value.dtype) for name, value in tensors.items())
        return id(self.whole), self.active, values, kinds

    def of_length(self, tokens: int) -> Pass:
        """With its records filled up."""
        inputs, labels = self.whole.base.filled_up(self.inputs, self.labels, tokens)
        return replace(self, inputs=inputs, labels=labels)


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


class SharedPasses:
    """Takes the passes of several sites, those together that go together."""

    def __init__(self, found: Company) -> None:
        self._found, self._most = found, found.most

    def __call__(self, passes: Sequence[Pass]) -> list[Callable[[], Gradients]]:
        """The gradients of every pass, in their order, each as a function that gives them or raises what went wrong.

        Args:
            passes: of different sites. The values in the models that they are over are lost.
        """
        answers: dict[int, Callable[[], Gradients]] = {}
        groups: dict[object, list[int]] = {}
        for place, one in enumerate(passes):
            key = one.joins(filled_up=self._found.rounding) if len(one.labels) >= self._found.fewest else place
            groups.setdefault(key, []).append(place)
        for places in groups.values():
            answers |= zip(places, self._cut([passes[place] for place in places]), strict=True)
        return [answers[place] for place in range(len(passes))]

    def _cut(self, passes: Sequence[Pass]) -> list[Callable[[], Gradients]]:
        parts = of_size([len(one.labels) for one in passes], self._most)
        return [answer for part in parts for answer in self._group([passes[place] for place in part])]

    def _group(self, passes: Sequence[Pass]) -> list[Callable[[], Gradients]]:
        if len(passes) == 1:
            return [_told(passes[0])]
        try:
            return [_given(found) for found in at_once(passes, by_record=self._found.by_record)]
        except torch.OutOfMemoryError:
            self._most = max(1, sum(len(one.labels) for one in passes) // 2)
            log.warning("passes of several sites need too much memory: at most %d records from now on", self._most)
        except Exception:
            log.debug("sites are taken one by one", exc_info=True)  # the fault is one site's: alone, it is raised there
            return [_told(one) for one in passes]
        return self._cut(passes)  # out of the handler, which holds on to what the pass has made


def of_size(records: Sequence[int], most: int) -> list[list[int]]:
    """Places of passes of so many records, cut into groups of at most ``most``, or of one."""
    groups: list[list[int]] = []
    held = most
    for place, count in enumerate(records):
        if held + count > most:
            groups.append([])
            held = 0
        groups[-1].append(place)
        held += count
    return groups


def _told(one: Pass) -> Callable[[], Gradients]:
    """What the pass alone gives, taken now: what it raises is raised when it is asked for."""
    try:
        return _given(alone(one))
    except Exception as fault:
        return _raised(fault)


def _given(found: Gradients) -> Callable[[], Gradients]:
    return lambda: found


def _raised(fault: Exception) -> Callable[[], Gradients]:
    def again() -> Gradients:
        raise fault

    return again


def alone(one: Pass) -> Gradients:
    """A pass over the records of one site."""
    whole = one.whole
    whole.adapter.load({name: value.detach() for name, value in one.adapter.parameters.items()})
    whole.adapter.activate(one.active)
    return whole.gradients(one.inputs, one.labels)


def at_once(passes: Sequence[Pass], *, by_record: bool = False) -> list[Gradients]:
    """One pass over the records of all, filled up to the longest.

    Raises:
        RuntimeError: a tensor that only the server changes is not every site's alike.
    """
    whole = passes[0].whole
    if len({one.tokens for one in passes}) > 1:
        passes = [one.of_length(max(other.tokens for other in passes)) for one in passes]
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

    gradients = whole.engine(len(labels), losses, whole.engine.owned(counts, values, by_record=by_record))
    by_site = {name: torch.split(value, counts) for name, value in gradients.items()}
    of_losses = torch.split(seen[-1].detach(), counts)
    return [({name: by_site[name][place] for name in by_site}, of_losses[place]) for place in range(len(passes))]


def joined(inputs: Sequence[Inputs]) -> Inputs:
    """The inputs of batches one after the other."""
    first = inputs[0]
    if isinstance(first, dict):
        return {name: torch.cat([one[name] for one in inputs if isinstance(one, dict)]) for name in first}
    return torch.cat([one for one in inputs if isinstance(one, Tensor)])
