"""The local DP-SGD loop of one site in one round: Algorithm 1 of arXiv 2602.19926 for any schedule and filter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lalora_flwr.adapter.form import Adapter
from lalora_flwr.adapter.slots import Layout, Mask
from lalora_flwr.data.inputs import Inputs, to_device
from lalora_flwr.data.records import RecordSet
from lalora_flwr.methods.filters import Around, Filter, State, others_of
from lalora_flwr.privacy.counting import Ledger
from lalora_flwr.privacy.mechanism import Mechanism, PrivateSum
from lalora_flwr.privacy.randomness import RandomSource, poisson_sample
from lalora_flwr.settings import TrainSettings
from lalora_flwr.training.learner import Learner
from lalora_flwr.training.views import mean_of_views, views

log = logging.getLogger("lalora_flwr.site")  # the site's own log; the server never sees it


def make_optimizer(parameters: Iterable[nn.Parameter], train: TrainSettings) -> torch.optim.Optimizer:
    """The local optimizer over all of the adapter; it leaves parameters without a gradient exactly as they are."""
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=train.lr, weight_decay=train.weight_decay)
    return torch.optim.SGD(parameters, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)


Gradients = Mapping[str, Tensor]  # per-record gradients by name, (records, *shape); empty if no record could be read


def add_part(total: PrivateSum, gradients_of: Callable[[Tensor], Gradients], part: Tensor, *, tolerant: bool) -> int:
    """Add the clipped gradients of a physical batch to the step's sum, whatever its records do to the model.

    Guarantee: adding or removing one record moves the sum by at most C, as `PrivateSum.add` promises, also if records make the
    pass fail, as long as the engine's gradients of a record do not depend on what else is in its part: exactly so for
    parts of one record, up to rounding otherwise. A record that fails when it is alone contributes zero; any other contributes
    its own clipped gradient, whether it went through with its part or, after another one made that fail, alone. So each
    contribution is a function of its record alone, and the sum a sum of vectors of norm at most C. Dropping the part that
    failed would break this: one record more would take its whole part out of the sum, and move it by the norm of all of
    them. A part that fails has changed nothing, since `PrivateSum.add` computes before it adds.

    Args:
        total: the step's sum.
        gradients_of: reads records and runs the model on them.
        part: their indices.
        tolerant: try again record by record; otherwise a failure is the caller's, as a simulation wants it.

    Returns:
        How many records contributed zero because they failed. It depends on the records: for the site's own log.
    """
    try:
        if gradients := gradients_of(part):
            total.add(gradients)
        return 0
    except Exception:
        if not tolerant:
            raise
        if len(part) <= 1:
            log.exception("a record makes the model fail and contributes nothing")
            return len(part)
    return sum(add_part(total, gradients_of, one, tolerant=True) for one in _one_by_one(part))


def _one_by_one(indices: Tensor) -> list[Tensor]:
    return [indices[i : i + 1] for i in range(len(indices))]


def _parts(records: RecordSet, batch: Tensor, most: int, *, tolerant: bool) -> list[Tensor]:
    """The physical batches of a step; of single records if they cannot be grouped."""
    try:
        return records.parts(batch, most)
    except Exception:
        if not tolerant:
            raise
        log.exception("the drawn records cannot be grouped and are processed one by one")
        return _one_by_one(batch)


@dataclass(frozen=True)
class LocalRound:
    """What a site does in a round, besides the constants of its noise.

    Attributes:
        server_round: from 1, for the site's log.
        layout: the slots as the site holds them.
        masks: the slots that train at each step; where they are fewer than the steps they repeat. None is empty.
        filter: what happens to the noised gradient.
        train: steps, optimizer, physical batch.
        tolerant: no record's failure ends the round (`add_part`); a real site's word.
    """

    server_round: int
    layout: Layout
    masks: Sequence[Mask]
    filter: Filter
    train: TrainSettings
    tolerant: bool = False


Memory = MutableMapping[str, State]  # what the filter remembers, by slot
MakeSum = Callable[[Mechanism, Mapping[str, torch.Size], torch.device], PrivateSum]


def train_round(
    learner: Learner,
    records: RecordSet,
    what: LocalRound,
    *,
    mechanism: Mechanism,
    ledger: Ledger,
    source: RandomSource,
    memory: Memory,
    make_sum: MakeSum = PrivateSum,
) -> int:
    """Take the round's K local steps on the learner's adapter, in place.

    Guarantee: each step is one `PrivateSum.release` on a Poisson sample of the records; whatever else happens to the
    adapter, and all that a filter remembers, is a function of those releases. The ledger counts K steps before the first.
    Records may be none: the releases are then noise alone.

    Returns:
        How many record gradients were not finite and counted as zero. For the site's own log: it depends on the records.

    Raises:
        BudgetExhausted: if the ledger refuses the round; the adapter is then untouched.
    """
    train, adapter = what.train, learner.adapter
    ledger.reserve(mechanism.noise_multiplier, mechanism.sample_rate, train.local_steps)
    optimizer = make_optimizer(adapter.parameters.values(), train)
    steps, others = _Steps(learner, records, what, mechanism, source, make_sum, memory), others_of(what.layout)
    noise = mechanism.noise_std / mechanism.expected_batch
    for step in range(train.local_steps):
        total, active = steps.collected(step)
        gradient = total.release(ledger, source)
        for name, parameter in active.items():
            around = Around(noise, adapter.parameters[others[name]].detach() if name in others else None)
            parameter.grad = what.filter(what.layout[name], gradient[name], memory.setdefault(name, {}), around)
        optimizer.step()
        steps.not_finite += total.not_finite
    ledger.commit()
    steps.say()
    return steps.not_finite


def step_along(adapter: Adapter, gradients: Mapping[str, Tensor], train: TrainSettings) -> None:
    """Take an optimizer's first step on an adapter, in place, along the gradients of some of its slots."""
    optimizer = make_optimizer(adapter.parameters.values(), train)
    for name, parameter in adapter.parameters.items():
        parameter.grad = gradients[name].to(parameter) if name in gradients else None
    optimizer.step()


Released = TypeVar("Released")


def gradient_round(
    learner: Learner,
    records: RecordSet,
    what: LocalRound,
    release: Callable[[PrivateSum], Released],
    *,
    mechanism: Mechanism,
    ledger: Ledger,
    source: RandomSource,
    make_sum: MakeSum = PrivateSum,
) -> tuple[Released, int]:
    """Collect the gradients of one step at the learner's adapter, which stays as it is, and let them out.

    Guarantee: what is returned is ``release`` of one `PrivateSum` over a Poisson sample of the records, which must be one of its
    own releases, with the ledger and the source given here. The ledger counts the step before a record is looked at.

    Returns:
        What was released, and how many record gradients were not finite and counted as zero (for the site's own log).

    Raises:
        BudgetExhausted: if the ledger refuses the round.
    """
    ledger.reserve(mechanism.noise_multiplier, mechanism.sample_rate, 1)
    steps = _Steps(learner, records, what, mechanism, source, make_sum)
    total, _ = steps.collected(0)
    released = release(total)
    ledger.commit()
    steps.say()
    return released, total.not_finite


class _Steps:
    """Collects a round's gradients, step by step."""

    def __init__(
        self,
        learner: Learner,
        records: RecordSet,
        what: LocalRound,
        mechanism: Mechanism,
        source: RandomSource,
        make_sum: MakeSum,
        memory: Memory | None = None,
    ) -> None:
        self._learner, self._records, self._what = learner, records, what
        self._mechanism, self._source, self._make_sum = mechanism, source, make_sum
        self._memory, self._ahead = memory, dict[str, Tensor]()
        self.not_finite = 0
        self._failed = 0
        self._seeds = torch.empty(0)
        self._losses: list[Tensor] = []  # of each batch's records; raw, for the site's own log
        if not learner.adapter.model.training:  # `Learner` says that its parts agree; a walk over them costs as much as a layer
            learner.adapter.model.train()

    def collected(self, step: int) -> tuple[PrivateSum, dict[str, nn.Parameter]]:
        """The clipped gradients of a Poisson sample, not yet let out, and the parameters that train at the step."""
        what, mechanism, records = self._what, self._mechanism, self._records
        active = self._learner.adapter.activate(what.masks[step % len(what.masks)])
        self._ahead = self._points_ahead(active)
        batch = poisson_sample(self._source, len(records), mechanism.sample_rate)
        if what.train.augmentations > 1:
            self._seeds = self._source.uniform(len(records))  # of every record, drawn or not: none shifts another's
        total = self._make_sum(mechanism, {name: p.shape for name, p in active.items()}, self._learner.adapter.device)
        for part in _parts(records, batch, what.train.max_physical_batch, tolerant=what.tolerant):
            self._failed += add_part(total, self._gradients_of, part, tolerant=what.tolerant)
        return total, active

    def _gradients_of(self, part: Tensor) -> Gradients:
        device = self._learner.adapter.device
        inputs, labels = self._records.batch(part)
        if not len(labels):
            return {}
        count = self._what.train.augmentations
        if count > 1:
            inputs, labels = self._views(inputs, labels, part)
        inputs, labels = to_device(inputs, device), labels.to(device)
        gradients, losses = self._learner.gradients(inputs, labels)
        self._losses.append(losses)
        if self._ahead:
            share = self._what.filter.ahead_share
            with self._moved_ahead():
                there, _ = self._learner.gradients(inputs, labels)
            gradients = {name: share * there[name] + (1 - share) * g for name, g in gradients.items()}
        return {name: mean_of_views(g, count) for name, g in gradients.items()} if count > 1 else gradients

    def _points_ahead(self, active: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Where else the step's gradients are taken, of the slots that move; empty: nowhere."""
        filter, found = self._what.filter, dict[str, Tensor]()
        if self._memory is not None and filter.ahead_share:
            for name, parameter in active.items():
                point = filter.ahead(parameter.detach(), self._memory.setdefault(name, {}))
                if point is not None:
                    found[name] = point
        return found

    @contextmanager
    def _moved_ahead(self) -> Iterator[None]:
        """The adapter there, and to the bit where it was when this is left, whatever happens in between."""
        adapter = self._learner.adapter
        here = {name: adapter.parameters[name].detach().clone() for name in self._ahead}
        try:
            adapter.load(self._ahead)
            yield
        finally:
            adapter.load(here)

    def _views(self, inputs: Inputs, labels: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """The views of the images of a part, and a label for each."""
        if not isinstance(inputs, Tensor):
            raise RuntimeError("there are views of images only")
        if len(labels) < len(part):  # some cannot be read
            part = torch.stack([one for one in part if len(self._records.batch(one[None])[1])])
        count = self._what.train.augmentations
        made = views(inputs, self._seeds[part], count, flips=self._what.train.flips)
        return made, labels.repeat_interleave(count, dim=0)

    def say(self) -> None:
        """Tell the site's own log how the round went."""
        if self._failed:
            log.error(
                "round %d: %d drawn records made the model fail and contributed nothing", self._what.server_round, self._failed
            )
        if self._losses:
            losses = torch.cat(self._losses)
            log.info("round %d: mean loss %.4f over %d drawn records", self._what.server_round, losses.mean(), len(losses))
