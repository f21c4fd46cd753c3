"""What is possible and still a mistake: budget spent on nothing, or a guarantee that says little. One line each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from lalora_flwr.methods.method import method_of
from lalora_flwr.privacy.noise import mechanism_for
from lalora_flwr.server.plan import Plan
from lalora_flwr.settings import Settings
from lalora_flwr.settings.schema import ROUNDS_A_REPEAT


def advice(settings: Settings, plan: Plan, smallest: int | None = None) -> list[str]:
    """Warnings about a run, for ``lalora plan`` and ``lalora run``.

    Args:
        settings: the run's.
        plan: its costs.
        smallest: records of the smallest site, if the split is known; default: of an equal split.
    """
    return list(_advice(settings, plan, plan.records if smallest is None else smallest))


def _advice(settings: Settings, plan: Plan, records: int) -> Iterator[str]:
    batch, delta = settings.train.batch_size, settings.privacy.delta
    if plan.new_head and plan.head == "frozen":
        yield "lora.head = 'frozen': the head is new and random, and stays so; leave lora.head on auto to train it"
    if not settings.private:
        return
    if records <= batch and not method_of(settings).full_batch:
        yield (
            f"train.batch-size = {batch}: the smallest site has {records} records, so all of them join every step (q = 1) and "
            "sampling adds no privacy; choose a smaller batch"
        )
    if delta >= 1 / records:
        yield f"privacy.delta = {delta:g}: not below 1 / {records} records of the smallest site, too weak a guarantee"
    drawn, sites = settings.sites_per_round, settings.num_supernodes
    rounds = settings.num_rounds - settings.ridge_first
    fair = math.ceil(rounds * drawn / sites)
    if settings.shares_noise:
        fair += math.ceil(settings.num_rounds / ROUNDS_A_REPEAT)
    if fair < settings.rounds_per_site:
        fair += settings.ridge_rounds
        limit = f"fraction-train = {settings.fraction_train:g}"
        if settings.privacy.max_rounds:
            limit = f"privacy.max-rounds = {settings.privacy.max_rounds}"
        fewer = dataclasses.replace(settings, privacy=dataclasses.replace(settings.privacy, max_rounds=fair))
        yield (
            f"{limit}: σ is calibrated for {settings.rounds_per_site} rounds; a site serves "
            f"{rounds * drawn / sites:.3g} on average. privacy.max-rounds = {fair} needs σ = "
            f"{mechanism_for(fewer, records).noise_multiplier:.3f}, not {mechanism_for(settings, records).noise_multiplier:.3f}"
        )
