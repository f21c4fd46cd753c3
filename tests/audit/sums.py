"""Sums to break: faults of privacy that published code has had, each one override."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from lalora_flwr.privacy.counting import Ledger
from lalora_flwr.privacy.mechanism import Mechanism, PrivateSum, Share
from lalora_flwr.privacy.randomness import RandomSource

Gradients = Mapping[str, Tensor]


class Scaled:
    """Noise of another size."""

    seeded = True

    def __init__(self, own: RandomSource, factor: float) -> None:
        self._own, self._factor = own, factor

    def normal(self, shape: torch.Size) -> Tensor:
        return self._own.normal(shape) * self._factor

    def uniform(self, n: int) -> Tensor:
        return self._own.uniform(n)


class Broken(PrivateSum):
    """A sum to break: each fault overrides one thing."""

    def __init__(self, mechanism: Mechanism, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        super().__init__(mechanism, shapes, device)
        self.about, self.all_shapes, self.where = mechanism, dict(shapes), device
        self.records = 0

    def noise(self) -> float:
        """Of the noise that there should be."""
        return 1.0

    def add(self, per_sample: Gradients) -> None:
        self.records += len(next(iter(per_sample.values())))
        super().add(per_sample)

    def release(self, ledger: Ledger, source: RandomSource) -> dict[str, Tensor]:
        return super().release(ledger, Scaled(source, self.noise()))

    def add_as_it_is(self, sums: Gradients) -> None:
        """Past the clip."""
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, torch.zeros(value.shape, dtype=torch.float64)) + value.double()


def joint_norms(per_sample: Gradients) -> Tensor:
    return torch.stack([g.double().flatten(1).square().sum(1) for g in per_sample.values()]).sum(0).sqrt()


def scaled(per_sample: Gradients, factors: Tensor) -> dict[str, Tensor]:
    return {name: torch.tensordot(factors.double(), g.double(), 1) for name, g in per_sample.items()}


class NoNoise(Broken):
    def noise(self) -> float:
        return 0.0


class HalfNoise(Broken):
    def noise(self) -> float:
        return 0.5


class NoiseOverBatch(Broken):
    def noise(self) -> float:
        return 1 / self.about.expected_batch


class NoiseWithoutC(Broken):
    """σ where σC has to be."""

    def noise(self) -> float:
        return 1 / self.about.clip_norm


class NoiseOnlyWithRecords(Broken):
    def noise(self) -> float:
        return 1.0 if self.records else 0.0


class NoClip(Broken):
    def add(self, per_sample: Gradients) -> None:
        self.add_as_it_is({name: g.sum(0) for name, g in per_sample.items()})


class MeanClipped(Broken):
    def add(self, per_sample: Gradients) -> None:
        mean = {name: g.mean(0, keepdim=True) for name, g in per_sample.items()}
        factor = (self.about.clip_norm / joint_norms(mean)).clamp(max=1.0)
        count = len(next(iter(per_sample.values())))
        self.add_as_it_is({name: count * value for name, value in scaled(mean, factor).items()})


class TensorByTensor(Broken):
    def add(self, per_sample: Gradients) -> None:
        for name, g in per_sample.items():
            self.add_as_it_is(scaled({name: g}, (self.about.clip_norm / joint_norms({name: g})).clamp(max=1.0)))


class WholeCForEach(Broken):
    """What is clipped apart has all of C, and so has the rest."""

    def add(self, per_sample: Gradients) -> None:
        for names, _ in self.about.bounds(per_sample):
            part = {name: per_sample[name] for name in names}
            self.add_as_it_is(scaled(part, (self.about.clip_norm / joint_norms(part)).clamp(max=1.0)))


class FirstTensorsNorm(Broken):
    """A layer whose gradient never reaches the norm."""

    def add(self, per_sample: Gradients) -> None:
        name = next(iter(per_sample))
        self.add_as_it_is(scaled(per_sample, (self.about.clip_norm / joint_norms({name: per_sample[name]})).clamp(max=1.0)))


class WindowByWindow(Broken):
    """Four windows of an image, each clipped as if it were a record."""

    def add(self, per_sample: Gradients) -> None:
        quarter = {name: g / 4 for name, g in per_sample.items()}
        for _ in range(4):
            super().add(quarter)


class MedianOfTheBatch(Broken):
    """C follows from the records."""

    def add(self, per_sample: Gradients) -> None:
        norms = joint_norms(per_sample)
        self.add_as_it_is(scaled(per_sample, (norms.median() / norms).clamp(max=1.0)))


class NormInFloat32(Broken):
    """Whose squares underflow: what is left unclipped."""

    def add(self, per_sample: Gradients) -> None:
        squares = torch.stack([g.float().flatten(1).square().sum(1) for g in per_sample.values()]).sum(0)
        self.add_as_it_is(scaled(per_sample, (self.about.clip_norm / squares.sqrt()).clamp(max=1.0)))


class NotANumber(Broken):
    """A gradient that is not finite goes on into the sum."""

    def add(self, per_sample: Gradients) -> None:
        self.add_as_it_is(scaled(per_sample, (self.about.clip_norm / joint_norms(per_sample)).clamp(max=1.0)))


class EmptyBatchesSkipped(Broken):
    def release(self, ledger: Ledger, source: RandomSource) -> dict[str, Tensor]:
        if not self.records:
            return {name: torch.zeros(shape) for name, shape in self.all_shapes.items()}
        return super().release(ledger, source)


class TrueBatch(Broken):
    """Divided by the number of records that were drawn."""

    def release(self, ledger: Ledger, source: RandomSource) -> dict[str, Tensor]:
        factor = self.about.expected_batch / max(1, self.records)
        return {name: value * factor for name, value in super().release(ledger, source).items()}


class LetOutTwice(Broken):
    def release(self, ledger: Ledger, source: RandomSource) -> dict[str, Tensor]:
        kept, shapes = dict(self._sums), dict(self._shapes)
        released = super().release(ledger, source)
        self._sums, self._shapes = kept, shapes
        return released


class NotCounted(Broken):
    def release(self, ledger: Ledger, source: RandomSource) -> dict[str, Tensor]:
        class Anything:
            def reserve(self, noise_multiplier: float, sample_rate: float, steps: int) -> None: ...
            def take_step(self) -> None: ...
            def commit(self) -> None: ...
            def epsilon(self) -> float:
                return 0.0

        return super().release(Anything(), source)


class SameNoiseAgain(Broken):
    """The generator starts anew at every step."""

    def release(self, ledger: Ledger, source: RandomSource) -> dict[str, Tensor]:
        return super().release(ledger, Again())


class Again:
    seeded = True

    def normal(self, shape: torch.Size) -> Tensor:
        return torch.from_numpy(np.random.default_rng(7).standard_normal(math.prod(shape))).view(shape)

    def uniform(self, n: int) -> Tensor:
        return torch.from_numpy(np.random.default_rng(7).random(n))


class ShareWithoutNoise(Broken):
    def release_share(self, ledger: Ledger, source: RandomSource, share: Share, kept: Collection[str] = ()) -> dict[str, Tensor]:
        return super().release_share(ledger, Scaled(source, 0.0), share, kept)


class HalfShare(Broken):
    def release_share(self, ledger: Ledger, source: RandomSource, share: Share, kept: Collection[str] = ()) -> dict[str, Tensor]:
        return super().release_share(ledger, Scaled(source, 0.5), share, kept)


class KeptWithShare(Broken):
    """What stays at the site has a share of the noise alone, as what is summed has."""

    def release_share(self, ledger: Ledger, source: RandomSource, share: Share, kept: Collection[str] = ()) -> dict[str, Tensor]:
        self._mechanism = dataclasses.replace(self._mechanism, noise_multiplier=share.multiplier)
        return super().release_share(ledger, source, share, kept)
