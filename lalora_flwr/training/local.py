"""The local DP-SGD loop of one site in one round: Algorithm 1 of arXiv 2602.19926 for any schedule and filter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lalora_flwr.adapter.slots import Layout, Mask
from lalora_flwr.data.inputs import Inputs, to_device
from lalora_flwr.data.records import RecordSet
from lalora_flwr.methods.filters import Filter, State
from lalora_flwr.privacy.counting import Ledger
from lalora_flwr.privacy.mechanism import Mechanism, PrivateSum
from lalora_flwr.privacy.randomness import RandomSource, poisson_sample
from lalora_flwr.settings import TrainSettings
from lalora_flwr.training.learner import Learner

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
    train, base, adapter = what.train, learner.base, learner.adapter
    ledger.reserve(mechanism.noise_multiplier, mechanism.sample_rate, train.local_steps)
    model, device = adapter.model, adapter.device
    optimizer = make_optimizer(adapter.parameters.values(), train)
    model.train()
    not_finite = failed = 0
    losses: list[Tensor] = []  # of each batch's records; raw, for the site's own log

    def gradients_of(part: Tensor) -> Gradients:
        inputs, labels = records.batch(part)
        if not len(labels):
            return {}
        inputs, labels = to_device(inputs, device), labels.to(device)
        seen: list[Tensor] = []

        def loss(inputs: Inputs = inputs, labels: Tensor = labels) -> Tensor:
            seen.append(value := adapter.losses(base, inputs, labels))
            return value

        gradients = learner.engine(len(labels), loss)
        losses.extend(value.detach() for value in seen)
        return gradients

    for step in range(train.local_steps):
        active = adapter.activate(what.masks[step % len(what.masks)])
        batch = poisson_sample(source, len(records), mechanism.sample_rate)
        total = make_sum(mechanism, {name: p.shape for name, p in active.items()}, device)
        for part in _parts(records, batch, train.max_physical_batch, tolerant=what.tolerant):
            failed += add_part(total, gradients_of, part, tolerant=what.tolerant)
        gradient = total.release(ledger, source)
        for name, parameter in active.items():
            parameter.grad = what.filter(what.layout[name], gradient[name], memory.setdefault(name, {}))
        optimizer.step()
        not_finite += total.not_finite
    ledger.commit()
    if failed:
        log.error("round %d: %d drawn records made the model fail and contributed nothing", what.server_round, failed)
    if losses:
        mean, drawn = torch.cat(losses).mean(), len(torch.cat(losses))
        log.info("round %d: mean loss %.4f over %d drawn records", what.server_round, mean, drawn)
    return not_finite
