"""Faults of privacy, planted: parts of a site that break the guarantee in ways that published code has, and what notices each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Context, Message, MetricRecord
from torch import Tensor

from lalora_flwr.audit.audit import Parts, _app, _AsOfAVirtualSite
from lalora_flwr.audit.replay import Serve
from lalora_flwr.privacy.counting import Ledger
from lalora_flwr.privacy.mechanism import Mechanism, PrivateSum, Share
from lalora_flwr.privacy.randomness import RandomSource
from lalora_flwr.site.host import Host
from lalora_flwr.wire.orders import ARRAYS

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
    def release_share(self, ledger: Ledger, source: RandomSource, share: Share) -> dict[str, Tensor]:
        return super().release_share(ledger, Scaled(source, 0.0), share)


class HalfShare(Broken):
    def release_share(self, ledger: Ledger, source: RandomSource, share: Share) -> dict[str, Tensor]:
        return super().release_share(ledger, Scaled(source, 0.5), share)


class Drawn(_AsOfAVirtualSite):
    """A sampler to break; its noise stays good."""

    def normal(self, shape: torch.Size) -> Tensor:
        return _AsOfAVirtualSite().normal(shape)


class Shuffled(Drawn):
    """Batches of one size from a shuffled pass over the records, counted as if they were independent draws."""

    def __init__(self) -> None:
        super().__init__()
        self._left: list[int] = []

    def uniform(self, n: int) -> Tensor:
        size = 40
        if len(self._left) < size:
            self._left = super().uniform(n).argsort().tolist()
        found = torch.ones(n, dtype=torch.float64)
        found[self._left[:size]] = 0.0
        self._left = self._left[size:]
        return found


class TwiceAsOften(Drawn):
    def uniform(self, n: int) -> Tensor:
        return super().uniform(n) / 2


class SameBatchAgain(Drawn):
    def uniform(self, n: int) -> Tensor:
        return Again().uniform(n)


def with_loss(host: Host) -> Serve:
    """The reply tells the mean loss of the site's records."""
    app = _app(host)

    def serve(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "train":
            reply.content["loss"] = MetricRecord({"loss": 0.5})
        return reply

    return serve


def with_raw_step(host: Host) -> Serve:
    """Beside the released steps the reply has one that never met the noise: here the sum of the records' labels."""
    app = _app(host)

    def serve(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "train":
            from lalora_flwr.settings import settings_from

            settings = settings_from(context.run_config)
            records = host.records(settings, context.node_config, host.learners.learner(settings).base)
            _, labels = records.batch(torch.arange(len(records)))
            arrays = reply.content[ARRAYS].to_torch_state_dict()
            name = next(iter(arrays))
            arrays[name] = arrays[name] + 1e-6 * float(labels.sum())
            reply.content[ARRAYS] = type(reply.content[ARRAYS])(arrays)
        return reply

    return serve


SHIFT, DEVIATION = "a record moves the sum by C at most", "noise has its full deviation"
EMPTY, ONCE = "an empty batch is noised and counted", "a sum is let out once, after it was counted"
SAMPLING, REUSE = "records join a step independently, with probability q", "no noise is drawn twice"
REPLY, BOUND = "a reply is made of releases alone", "the bound"


@dataclass(frozen=True)
class Fault:
    """A planted fault.

    Attributes:
        parts: with it.
        caught: what has to notice it: contracts, or the bound; others may as well.
        settings: of the audited run, where they matter.
    """

    parts: Parts
    caught: frozenset[str]
    settings: Mapping[str, object]


def _sum(make: Callable[..., PrivateSum], *caught: str, **settings: object) -> Fault:
    return Fault(Parts(make_sum=make), frozenset(caught), settings)


def _draws(make: Callable[[], RandomSource], *caught: str) -> Fault:
    return Fault(Parts(draws=make), frozenset(caught), {})


SHARED = {"trust": "secure-sum", "strategy": "steady-lora", "train__local_steps": 1, "num_rounds": 10}
FAULTS: dict[str, Fault] = {
    "no noise": _sum(NoNoise, DEVIATION, BOUND),
    "half the noise": _sum(HalfNoise, DEVIATION, BOUND),
    "noise divided by the batch": _sum(NoiseOverBatch, DEVIATION, BOUND),
    "noise of σ in place of σC": _sum(NoiseWithoutC, DEVIATION, BOUND, privacy__clip_norm=4.0),
    "noise only where records were drawn": _sum(NoiseOnlyWithRecords, EMPTY),
    "no clip": _sum(NoClip, SHIFT, BOUND),
    "the mean gradient clipped": _sum(MeanClipped, SHIFT, BOUND),
    "each tensor clipped to C": _sum(TensorByTensor, SHIFT, BOUND),
    "a tensor missing in the norm": _sum(FirstTensorsNorm, SHIFT, BOUND),
    "each window clipped as a record": _sum(WindowByWindow, SHIFT, BOUND),
    "C from the records' median": _sum(MedianOfTheBatch, SHIFT, BOUND),
    "norms that underflow in float32": _sum(NormInFloat32, SHIFT),
    "gradients that are no numbers": _sum(NotANumber, SHIFT),
    "empty batches skipped": _sum(EmptyBatchesSkipped, EMPTY),
    "divided by the drawn batch": _sum(TrueBatch, SHIFT),
    "a sum let out twice": _sum(LetOutTwice, ONCE),
    "steps that the ledger does not count": _sum(NotCounted, ONCE, EMPTY),
    "the same noise at every step": _sum(SameNoiseAgain, REUSE),
    "shuffled batches, counted as Poisson's": _draws(Shuffled, SAMPLING),
    "records drawn twice as often": _draws(TwiceAsOften, SAMPLING),
    "the same batch at every step": _draws(SameBatchAgain, SAMPLING),
    "a raw loss in the reply": Fault(Parts(app=with_loss), frozenset({REPLY}), {}),
    "a raw step beside the released ones": Fault(Parts(app=with_raw_step), frozenset({REPLY}), {}),
    "a shared noise that is not added": _sum(ShareWithoutNoise, DEVIATION, BOUND, **SHARED),
    "half of a shared noise": _sum(HalfShare, DEVIATION, **SHARED),
}
