"""Samplers and replies to break, and the table of all planted faults with what notices each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from flwr.app import Context, Message, MetricRecord
from torch import Tensor

from lalora_flwr.audit.audit import Parts, _app, _AsOfAVirtualSite
from lalora_flwr.audit.replay import Serve
from lalora_flwr.privacy.mechanism import PrivateSum
from lalora_flwr.privacy.randomness import RandomSource
from lalora_flwr.settings import settings_from
from lalora_flwr.site.host import Host
from lalora_flwr.wire.orders import ARRAYS
from tests.audit import sums
from tests.audit.sums import Again


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
    "no noise": _sum(sums.NoNoise, DEVIATION, BOUND),
    "half the noise": _sum(sums.HalfNoise, DEVIATION, BOUND),
    "noise divided by the batch": _sum(sums.NoiseOverBatch, DEVIATION, BOUND),
    "noise of σ in place of σC": _sum(sums.NoiseWithoutC, DEVIATION, BOUND, privacy__clip_norm=4.0),
    "noise only where records were drawn": _sum(sums.NoiseOnlyWithRecords, EMPTY),
    "no clip": _sum(sums.NoClip, SHIFT, BOUND),
    "the mean gradient clipped": _sum(sums.MeanClipped, SHIFT, BOUND),
    "each tensor clipped to C": _sum(sums.TensorByTensor, SHIFT, BOUND),
    "parts clipped to C each": _sum(sums.WholeCForEach, SHIFT, strategy="dp-lora", privacy__clipping="apart"),
    "a tensor missing in the norm": _sum(sums.FirstTensorsNorm, SHIFT, BOUND),
    "each window clipped as a record": _sum(sums.WindowByWindow, SHIFT, BOUND),
    "C from the records' median": _sum(sums.MedianOfTheBatch, SHIFT, BOUND),
    "norms that underflow in float32": _sum(sums.NormInFloat32, SHIFT),
    "gradients that are no numbers": _sum(sums.NotANumber, SHIFT),
    "empty batches skipped": _sum(sums.EmptyBatchesSkipped, EMPTY),
    "divided by the drawn batch": _sum(sums.TrueBatch, SHIFT),
    "a sum let out twice": _sum(sums.LetOutTwice, ONCE),
    "steps that the ledger does not count": _sum(sums.NotCounted, ONCE, EMPTY),
    "the same noise at every step": _sum(sums.SameNoiseAgain, REUSE),
    "shuffled batches, counted as Poisson's": _draws(Shuffled, SAMPLING),
    "records drawn twice as often": _draws(TwiceAsOften, SAMPLING),
    "the same batch at every step": _draws(SameBatchAgain, SAMPLING),
    "a raw loss in the reply": Fault(Parts(app=with_loss), frozenset({REPLY}), {}),
    "a raw step beside the released ones": Fault(Parts(app=with_raw_step), frozenset({REPLY}), {}),
    "a shared noise that is not added": _sum(sums.ShareWithoutNoise, DEVIATION, BOUND, **SHARED),
    "half of a shared noise": _sum(sums.HalfShare, DEVIATION, **SHARED),
    "a share of the noise on what stays at a site": _sum(sums.KeptWithShare, DEVIATION, **{**SHARED, "strategy": "fedsa-lora"}),
}
