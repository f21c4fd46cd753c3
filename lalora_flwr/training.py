"""The local DP-SGD loop of one site in one round: Algorithm 1 of arXiv 2602.19926 for any schedule and filter."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lalora_flwr.config import TrainSettings
from lalora_flwr.data.inputs import Inputs, to_device
from lalora_flwr.data.records import RecordSet
from lalora_flwr.lora.adapter import adapter_parameters, set_active
from lalora_flwr.lora.per_sample import PerSampleGradients
from lalora_flwr.lora.schedule import Schedule
from lalora_flwr.models.base import BaseModel
from lalora_flwr.privacy.filters import FILTERS
from lalora_flwr.privacy.ledger import Ledger
from lalora_flwr.privacy.mechanism import Mechanism, PrivateSum
from lalora_flwr.privacy.randomness import RandomSource, poisson_sample

log = logging.getLogger("lalora_flwr.site")  # the site's own log; the server never sees it


def make_optimizer(parameters: Iterable[nn.Parameter], train: TrainSettings) -> torch.optim.Optimizer:
    """The local optimizer over all of the adapter; it leaves parameters without a gradient exactly as they are."""
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=train.lr, weight_decay=train.weight_decay)
    return torch.optim.SGD(parameters, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)


def train_round(
    base: BaseModel,
    model: nn.Module,
    engine: PerSampleGradients,
    records: RecordSet,
    *,
    server_round: int,
    schedule: Schedule,
    filter_name: str,
    train: TrainSettings,
    mechanism: Mechanism,
    ledger: Ledger,
    source: RandomSource,
) -> int:
    """Take the round's K local steps on the model's adapter, in place.

    Guarantee: each step is one `PrivateSum.release` on a Poisson sample of the records; whatever else happens to the
    adapter is a function of those releases. The ledger counts K steps before the first.

    Returns:
        How many record gradients were not finite and counted as zero. For the site's own log: it depends on the records.

    Raises:
        BudgetExhausted: if the ledger refuses the round; the adapter is then untouched.
    """
    ledger.reserve(mechanism.noise_multiplier, mechanism.sample_rate, train.local_steps)
    optimizer = make_optimizer(adapter_parameters(model).values(), train)
    device = next(model.parameters()).device
    model.train()
    not_finite = 0
    losses: list[Tensor] = []  # of each batch's records; raw, for the site's own log
    for step in range(train.local_steps):
        active = set_active(model, schedule.active(server_round, step))
        batch = poisson_sample(source, len(records), mechanism.sample_rate)
        total = PrivateSum(mechanism, {name: p.shape for name, p in active.items()}, device)
        for part in records.parts(batch, train.max_physical_batch):
            inputs, labels = records.batch(part)
            if len(labels):
                inputs, labels = to_device(inputs, device), labels.to(device)

                def loss(inputs: Inputs = inputs, labels: Tensor = labels) -> Tensor:
                    losses.append(value := base.losses(model, inputs, labels))
                    return value

                total.add(engine(len(labels), loss))
                losses[-1] = losses[-1].detach()
        gradient = total.release(ledger, source)
        for name, parameter in active.items():
            parameter.grad = FILTERS[filter_name](name, gradient[name])
        optimizer.step()
        not_finite += total.not_finite
    ledger.commit()
    if losses:
        log.info("round %d: mean loss %.4f over %d drawn records", server_round, torch.cat(losses).mean(), len(torch.cat(losses)))
    return not_finite
