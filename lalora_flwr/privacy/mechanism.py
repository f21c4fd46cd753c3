"""One step's release: clip each record, sum, add noise, divide by the expected batch size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lalora_flwr.privacy.ledger import Ledger
from lalora_flwr.privacy.randomness import RandomSource


@dataclass(frozen=True)
class Mechanism:
    """The public constants of a site's steps; none of them may come from private records.

    Attributes:
        noise_multiplier: σ; the noise on the sum has standard deviation σC. 0: no clip and no noise (not private).
        clip_norm: C, the L2 bound on one record's gradient over all active tensors together.
        sample_rate: q, each record's probability of joining a step.
        expected_batch: the fixed divisor of the sum, in records.
    """

    noise_multiplier: float
    clip_norm: float
    sample_rate: float
    expected_batch: float

    @property
    def private(self) -> bool:
        return self.noise_multiplier > 0


def clip(per_sample: Mapping[str, Tensor], clip_norm: float) -> tuple[dict[str, Tensor], int]:
    """Sum of the per-sample gradients, each scaled to a joint L2 norm of at most ``clip_norm``.

    Guarantee: adding or removing one record moves the sums, taken as one vector, by at most ``clip_norm`` up to float32
    rounding. A record whose gradient or norm is not finite contributes zero. ``clip_norm = inf`` only drops those.

    Args:
        per_sample: tensors of shape (records, *parameter.shape).
        clip_norm: C > 0.

    Returns:
        The sums, float32, of the parameters' shapes; and how many records were not finite (for the site's log only).
    """
    squares = [g.flatten(1).float().square().sum(1) for g in per_sample.values()]
    norms = torch.stack(squares).sum(0).sqrt()  # (records,)
    finite = torch.isfinite(norms)
    factors = torch.where(finite, (clip_norm / norms).clamp(max=1.0), 0.0)  # 0 / 0 and C / 0 both end at 1
    factors = torch.where(norms == 0, 1.0, factors)
    if not finite.all():  # 0 · inf would be NaN
        per_sample = {name: g.masked_fill(~finite.view(-1, *[1] * (g.dim() - 1)), 0.0) for name, g in per_sample.items()}
    return {name: torch.tensordot(factors, g.float(), dims=1) for name, g in per_sample.items()}, int((~finite).sum())


class PrivateSum:
    """Collects clipped gradients of one step and lets them out only with noise.

    Guarantee: `release` is the Poisson-subsampled Gaussian mechanism with the constants of ``mechanism``, provided that
    `add` got each sampled record once. The sum without noise is never returned, and the ledger counts the step first.
    """

    def __init__(self, mechanism: Mechanism, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        self._mechanism, self._shapes, self._device = mechanism, dict(shapes), device
        self._sums: dict[str, Tensor] = {}  # made with the first batch: nothing is held through its forward pass
        self.not_finite = 0  # records that contributed zero; stays on the site

    def add(self, per_sample: Mapping[str, Tensor]) -> None:
        """Clip and add a physical batch, tensors of shape (records, *shape); names must be exactly those of the step."""
        if per_sample.keys() != self._shapes.keys():
            raise RuntimeError("the gradients are not those of the step's active tensors")
        bound = self._mechanism.clip_norm if self._mechanism.private else math.inf
        sums, not_finite = clip(per_sample, bound)
        self.not_finite += not_finite
        for name, value in sums.items():
            if name in self._sums:
                self._sums[name] += value
            else:
                self._sums[name] = value

    def release(self, ledger: Ledger, source: RandomSource) -> dict[str, Tensor]:
        """The noised mean gradient. Also right for an empty batch: pure noise, counted like any step."""
        ledger.take_step()
        shapes, self._shapes = self._shapes, {}  # a second release holds nothing
        std = self._mechanism.noise_multiplier * self._mechanism.clip_norm
        released = {}
        for name, shape in shapes.items():
            value = self._sums.pop(name) if name in self._sums else torch.zeros(shape, device=self._device)
            if self._mechanism.private:
                value = value + std * source.normal(shape).to(value.device)
            released[name] = value / self._mechanism.expected_batch
        return released
