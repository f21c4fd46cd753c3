"""What an attacker gains: two runs of a site, with a record and without it, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import Message
from torch import Tensor

from lalora_flwr.ledger.entries import Reserve
from tests.attacks.attacker import Draws, Site, Step


def problems(
    message: Message, run: Mapping[str, Any], whole: Site, without: Site, *, seed: int = 0, all_usable: bool = True
) -> list[str]:
    """What an attacker gains from one order beyond what the ledger charged for it; nothing if the site is sound.

    ``without`` is ``whole`` less its last record. Either both refuse alike and count nothing, or both count the same and
    reply; then each step's sums, from the same history onwards, are at most C apart, the noise has at least σC, the batch
    was drawn at the counted rate (or holds less, unless the records are ``all_usable``), and the replies are the same
    function of what was released.
    """
    one = whole.serve(message, run, draws=Draws(seed))
    two = without.serve(message, run, draws=Draws(seed), script=one.steps)
    if one.reason != two.reason:
        return [f"the record decides the answer: {one.reason!r} with it, {two.reason!r} without"]
    if one.reason:
        return [f"refused ({one.reason}), but counted"] if one.reserved or two.reserved else []
    found = []
    if [_charge(r) for r in one.reserved] != [_charge(r) for r in two.reserved] or len(one.reserved) != 1:
        return ["what is counted depends on the record, or is not one round"]
    charged = one.reserved[0]
    if not len(one.steps) == len(two.steps) == charged.steps:
        return [f"{len(one.steps)} and {len(two.steps)} releases, {charged.steps} counted"]
    for number, (with_it, without_it) in enumerate(zip(one.steps, two.steps, strict=True)):
        found += [f"step {number}: {text}" for text in step_problems(with_it, without_it, charged.sigma, charged.clip_norm)]
        for served, step in ((one, with_it), (two, without_it)):
            assert served.draws is not None
            drawn = int((served.draws.uniforms[number] < charged.q).sum())
            if step.records > drawn or (all_usable and step.records < drawn):
                found.append(f"step {number}: the batch was not drawn at the counted rate {charged.q}")
    same = one.tensors.keys() == two.tensors.keys()
    if not same or any(not torch.equal(_bits(t), _bits(two.tensors[n])) for n, t in one.tensors.items()):
        found.append("the reply tells more of the records than what was released")
    if one.counters != two.counters:
        found.append("the counters depend on the record")
    return found


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)  # NaN equals itself


def _charge(entry: Reserve) -> tuple[Any, ...]:
    return entry.sigma, entry.clip_norm, entry.q, entry.steps, entry.epsilon


def step_problems(with_it: Step, without_it: Step, sigma: float, clip_norm: float) -> list[str]:
    """Whether one record moves a sum by more than C, and whether the noise is less than σC."""
    std = sigma * clip_norm
    # the sums are seen as they were released, in float32
    rounding = 2.0**-23 * float(with_it.total.norm() + without_it.total.norm())
    moved = float((with_it.total - without_it.total).norm())
    found = []
    if not moved <= clip_norm * (1 + 1e-6) + rounding:
        found.append(f"one record moves the sum by {moved / clip_norm:.4g} C")
    for step in (with_it, without_it):
        least = float(step.noise.abs().min())
        if not least >= std * (1 - 1e-3) - rounding:
            found.append(f"the noise is {least / std:.4g} of what was counted")
    return found
