"""Seconds, memory and bytes of a run, from its settings alone.

A site's step is its passes of the model (`trace`, priced by `prices`) and one release: clip, noise and step, which is run once on
made-up gradients. What Python does for a message and a round was measured once (`python -m benchmarks.cost_model` prints it, and
how far estimates are from measured runs) and is kept as so many calls of a kernel, so that it follows the machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lalora_flwr.adapter.form import Adapter
from lalora_flwr.adapter.slots import Layout, Mask
from lalora_flwr.cost.prices import Hardware, Here, Prices, seconds
from lalora_flwr.cost.trace import Traced, traced
from lalora_flwr.data.data_set import facts
from lalora_flwr.data.inputs import Inputs
from lalora_flwr.gradients.dropout import remove_dropout
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.ground.hardware import choose_dtype
from lalora_flwr.methods.method import Method, method_of
from lalora_flwr.models import load_base_model
from lalora_flwr.models.base import BaseModel
from lalora_flwr.models.four_bits import NF4
from lalora_flwr.models.text import TextModel
from lalora_flwr.privacy.counting import RunLedger
from lalora_flwr.privacy.events import Target
from lalora_flwr.privacy.mechanism import Mechanism, PrivateSum
from lalora_flwr.privacy.randomness import SeededRandom
from lalora_flwr.settings import Settings
from lalora_flwr.training.company import GAIN, SLOW
from lalora_flwr.training.learner import cast_base
from lalora_flwr.training.together import MOST_RECORDS, WORTH_IT

# What is not a step: calls of a kernel that take as long, and seconds for a byte of the adapter.
STEP_CALLS = 500.0  # a step's sample, filter and optimizer
MESSAGE_CALLS, MESSAGE_BYTE = 720.0, 2e-9  # a site's message
ROUND_CALLS, ROUND_BYTE = 4700.0, 1.4e-9  # the server's round, and a site's reply in it
RAY_MESSAGE = 0.003  # seconds of a site's part of a parcel through Ray beside all that (docs/scale.md, ten sites, K = 1)
PROCESS_MESSAGE = 5.1  # seconds of a round of real sites beside their work (docs/results.md, "Rounds of real sites")
PROCESS_BYTES = 850e6  # of a process with torch, transformers, this package and free memory that it keeps
GPU_BYTES = 0.5e9  # of a CUDA context


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        on: what the prices are of.
        tokens: of a text; 0: no texts.
        pass_seconds: of the passes of one step at a site.
        release_seconds: of all else of the step: sample, clip, noise, filter, optimizer.
        message_seconds: of a site's round beside its steps.
        server_seconds: of the server's part of a round.
        round_seconds: of a round.
        run_seconds: of all rounds, without start and evaluation.
        worker_bytes: memory of a process that trains: this package, the frozen model, a step at its widest; of its GPU on other
            hardware.
        adapter_bytes: of what trains and travels.
    """

    on: str
    tokens: int
    pass_seconds: float
    release_seconds: float
    message_seconds: float
    server_seconds: float
    round_seconds: float
    run_seconds: float
    worker_bytes: float
    adapter_bytes: int


@dataclass(frozen=True)
class Pass:
    """Of one site.

    Attributes:
        seconds: its share of a pass of ``sites``.
        peak: bytes at the widest of that.
    """

    seconds: float
    peak: int
    sites: int


@dataclass(frozen=True)
class Model:
    """The run's architecture, without numbers, and what is trained on it."""

    base: BaseModel
    adapter: Adapter
    engine: PerSampleGradients
    method: Method

    @classmethod
    def of(cls, settings: Settings, dtype: torch.dtype) -> Model:
        """The model with its frozen weights in ``dtype``, those apart that the settings keep in four bits."""
        base = load_base_model(settings.model, facts(settings), settings.data.max_tokens, weights=False)
        base.module.requires_grad_(False)
        remove_dropout(base.module)
        base = cast_base(base, next(base.module.parameters()).device, dtype, four_bits=settings.model.dtype == NF4)
        if settings.train.gradient_checkpointing:
            base.checkpoint_activations()
        method = method_of(settings)
        adapter = method.form_of.attach(base, settings.lora, seed=0)
        return cls(base, adapter, PerSampleGradients(adapter.model, adapter.parameters), method)

    @property
    def layout(self) -> Layout:
        return self.adapter.layout

    def masks(self, settings: Settings) -> list[Mask]:
        """The slots that train in the local steps of the first two rounds."""
        directive, steps = self.method.merge.start(self.layout), settings.train.local_steps
        found: list[Mask] = []
        for server_round in (1, 2):
            foreseen = self.method.schedule.foreseen(self.layout, server_round, directive)
            masks = self.method.schedule.masks(self.layout, server_round, steps, foreseen)
            found += [masks[step % len(masks)] for step in range(steps)]
        return found

    def batch(self, records: int, tokens: int) -> tuple[Inputs, Tensor]:
        """Made-up records of so many tokens, if they are texts."""
        usual = self.base.tokens(self.base.synthetic_batch(1, torch.Generator().manual_seed(0))[0])
        base = replace(self.base, input_shape=(tokens,)) if tokens < usual else self.base
        inputs, labels = base.synthetic_batch(records, torch.Generator().manual_seed(0))
        longer = tokens > usual > 0
        return self.base.filled_up(inputs, labels, tokens) if longer else (inputs, labels)

    def traced(self, mask: Mask, records: int, tokens: int) -> Traced:
        return traced(self.base, self.adapter, self.engine, mask, self.batch(records, tokens))


@dataclass
class Estimator:
    """Estimates runs at the same prices.

    Args:
        prices: of operations.
        clock: seconds of this process, for what is run here.
    """

    prices: Prices = field(default_factory=Here)
    clock: Callable[[], float] = time.perf_counter

    def estimate(self, settings: Settings, engine: str = "inline", workers: int = 1, tokens: int = 0) -> Estimate:
        """What the run will take.

        Args:
            settings: of the run.
            engine: ``inline``, ``ray`` or ``sites`` (real ones, each on its own machine).
            workers: processes that share the sites of a round.
            tokens: of a text; 0: ``data.max-tokens``, the most.
        """
        model, train = Model.of(settings, self._dtype(settings)), settings.train
        batch = min(train.batch_size, train.max_physical_batch or train.batch_size)
        parts = math.ceil(train.batch_size / batch)
        tokens = tokens or settings.data.max_tokens
        if isinstance(model.base, TextModel):
            tokens = min(tokens, model.base.max_tokens)  # the model may have positions for fewer
        masks = model.masks(settings)
        distinct = {mask: masks.count(mask) / len(masks) for mask in dict.fromkeys(masks)}
        steps = settings.num_rounds * settings.sites_per_round * train.local_steps
        sharing = engine != "sites" and train.share_passes != "off" and steps >= WORTH_IT and not settings.lora.dropout
        at_once = math.ceil(settings.sites_per_round / workers) if sharing else 1
        passes = {mask: self._pass(model, mask, batch * train.augmentations, at_once, tokens) for mask in distinct}
        pass_seconds = parts * sum(share * passes[mask].seconds for mask, share in distinct.items())
        pass_seconds *= 2 if model.method.filter.ahead_share else 1
        call = self.call()
        release = sum(
            share * self._release(model.layout, mask, train.batch_size, passes[mask].sites) for mask, share in distinct.items()
        )
        release += STEP_CALLS * call
        adapter_bytes = 4 * sum(math.prod(slot.shape) for slot in model.layout.values())
        message = MESSAGE_CALLS * call + MESSAGE_BYTE * adapter_bytes + {"ray": RAY_MESSAGE}.get(engine, 0.0)
        sites = settings.sites_per_round
        server = ROUND_CALLS * call + sites * ROUND_BYTE * adapter_bytes
        site = train.local_steps * (pass_seconds + release) + message
        waves = 1 if engine == "sites" else sites / min(workers, sites)
        a_round = waves * site + server + (PROCESS_MESSAGE if engine == "sites" else 0.0)
        network = model.adapter.model
        frozen = sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))
        widest = max(one.peak for one in passes.values())
        return Estimate(
            on=self.prices.name,
            tokens=tokens if model.base.tokens(model.batch(1, tokens)[0]) else 0,
            pass_seconds=pass_seconds,
            release_seconds=release,
            message_seconds=message,
            server_seconds=server,
            round_seconds=a_round,
            run_seconds=settings.num_rounds * a_round,
            worker_bytes=(GPU_BYTES if isinstance(self.prices, Hardware) else PROCESS_BYTES) + frozen + widest,
            adapter_bytes=adapter_bytes,
        )

    def _dtype(self, settings: Settings) -> torch.dtype:
        if isinstance(self.prices, Hardware):  # all that is known has units for bfloat16
            return torch.float32 if settings.model.dtype == "float32" else torch.bfloat16
        return choose_dtype(settings.model.dtype, torch.device("cpu"))

    def _pass(self, model: Model, mask: Mask, records: int, sites: int, tokens: int) -> Pass:
        """One site's pass; in company with others where that is faster."""
        alone = model.traced(mask, records, tokens)
        found, peak = seconds(alone, self.prices), alone.peak
        together = min(sites, MOST_RECORDS // records, int(SLOW / found) if found else sites)
        if together > 1:
            shared = model.traced(mask, together * records, tokens)
            in_company = seconds(shared, self.prices) / together
            if in_company < GAIN * found:
                return Pass(in_company, shared.peak, together)
        return Pass(found, peak, 1)

    def _release(self, layout: Layout, mask: Mask, records: int, sites: int) -> float:
        """Seconds of a site's clip and noise over made-up gradients, run here: for a model on a GPU, too, a processor draws the
        noise. Gradients of a pass of several sites are read one site after the other, when they have left the nearest cache."""
        shapes = {name: torch.Size(layout[name].shape) for name in sorted(mask)}
        entries = sum(shape.numel() for shape in shapes.values())
        most = max(1, min(records, int(2e7 // max(1, entries))))  # made-up gradients of 80 MB at most; the clip is linear in them
        sites = max(1, min(sites, int(2e7 // max(1, entries * most))))
        gradients = {name: torch.full((sites * most, *shape), 1e-3) for name, shape in shapes.items()}
        of_sites = [{name: value[site * most : (site + 1) * most] for name, value in gradients.items()} for site in range(sites)]
        ledger, best = RunLedger(Target(math.inf, 1e-5, 10**9, "pld")), [math.inf, math.inf]
        ledger.reserve(1.0, 1.0, 4 * sites)
        for _ in range(4):
            adding = releasing = 0.0
            for own in of_sites:
                total = PrivateSum(Mechanism(1.0, 1.0, 1.0, float(records)), shapes, torch.device("cpu"))
                begun = self.clock()
                total.add(own)
                added = self.clock()
                total.release(ledger, SeededRandom(0, 0, 0))
                adding, releasing = adding + added - begun, releasing + self.clock() - added
            best = [min(best[0], adding / sites), min(best[1], releasing / sites)]
        return best[0] * records / most + best[1]

    def call(self) -> float:
        """Seconds of the call of a small kernel: how fast Python is here."""
        one = torch.ones(64)
        best = math.inf
        for _ in range(200):
            begun = self.clock()
            torch.add(one, one)
            best = min(best, self.clock() - begun)
        return max(best, 5e-7)
