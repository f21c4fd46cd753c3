"""What a run's noise does to the product B A of a layer: once for each factor, and once more where both have it.

    (B + N_B)(A + N_A) - B A  =  B N_A + N_B A  +  N_B N_A

Rank components carry independent noise, whatever a filter does along the features, so with a layer's rank r and s = α / r

    E‖s N_B N_A‖² = s² E‖N_B‖² E‖N_A‖² / r         E‖s (B N_A + N_B A)‖² = s² (‖B‖² E‖N_A‖² + ‖A‖² E‖N_B‖²) / r

and E‖N‖² follows from public constants (`lalora_flwr.server.signals.noise_energy`). The noise is that of the mean over the sites
of a round, after one local step, after one round and after the whole run, each step's added to the last and nothing pulling it
back.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lalora_flwr.adapter.slots import Layout, factors_of
from lalora_flwr.methods.method import Method
from lalora_flwr.methods.secure_sum import share_for
from lalora_flwr.server.metrics import Summary
from lalora_flwr.server.signals import Round, kept_by, trained_times, unknown_noise, unknown_steps
from lalora_flwr.server.stepping import ServerStep
from lalora_flwr.settings import Settings
from lalora_flwr.training.rate import rate_for

SPANS = ("step", "round", "run")


@dataclass(frozen=True)
class Amplified:
    """Over one layer, or all of them together; each number by `SPANS`.

    Attributes:
        product: the root of E‖s N_B N_A‖²; 0 if no step, or round, has noise in both factors.
        linear: the root of E‖s (B N_A + N_B A)‖², with the A and B of the run's end.
    """

    product: Mapping[str, float]
    linear: Mapping[str, float]


@dataclass(frozen=True)
class Amplification:
    """
    Attributes:
        unknown: why nothing else is here; empty if it is.
        noise: standard deviation of the noise on an entry of the mean gradient of a round's sites.
        whole: of all layers together.
        layers: of each, by its name.
    """

    unknown: str = ""
    noise: float = 0.0
    whole: Amplified | None = None
    layers: Mapping[str, Amplified] = field(default_factory=dict)


def noise_of_run(settings: Settings, summary: Summary) -> float:
    """ν of the mean over the sites of a round, as the counters of a finished run have it."""
    own = [site.noise_multiplier for site in summary.sites.values() if site.noise_multiplier]
    sigma = statistics.median(own) if own else summary.noise_multiplier or 0.0
    sites, batch = settings.sites_per_round, settings.train.batch_size
    if settings.shares_noise:
        sigma = share_for(sigma, sites, settings.colluders)
    return sigma * settings.privacy.clip_norm / batch / math.sqrt(sites)


def amplification(
    settings: Settings, method: Method, layout: Layout, summary: Summary, adapter: Mapping[str, Tensor]
) -> Amplification:
    """Of a finished run.

    Guarantee: of public constants and the released adapter.

    Args:
        settings, method, layout, summary: of the run.
        adapter: the tensors it ended with.
    """
    if unknown := _unknown(settings, method, layout):
        return Amplification(unknown=unknown)
    noise = noise_of_run(settings, summary)
    scale = settings.lora.alpha / settings.lora.rank
    spans = _energies(settings, method, layout, noise)
    layers = {layout[a].layer: _amplified(scale, a, b, spans, adapter) for a, b in factors_of(layout)}
    return Amplification(noise=noise, whole=_together(layers.values()), layers=layers)


def _unknown(settings: Settings, method: Method, layout: Layout) -> str:
    if not list(factors_of(layout.only(layout.trainable))):
        return f"the form {method.form!r} has no factors A and B that train"
    if key := unknown_noise(settings, method) or unknown_steps(settings, method):
        return f"{key}: a step is no sum of noised gradients times a rate" if "epsilon" not in key else "the run has no noise"
    if method.merge.steers or method.merge.start(layout):
        return f"merge.name = {method.merge.name!r}: what trains when follows from directives, which no file keeps"
    if method.merge.rewrites:
        return f"merge.name = {method.merge.name!r}: the noise of a round is turned into other factors after it"
    if method.travel.takes_profiles:
        return f"strategy = {settings.strategy!r}: sites may train different parts, and no file keeps which"
    if any(kept_by(method.filter, layout[name]) is None for pair in factors_of(layout) for name in pair):
        return f"filter.name = {method.filter.name!r}: is not linear"
    return ""


Energies = Mapping[str, float]  # E‖N‖² by slot


def _energies(settings: Settings, method: Method, layout: Layout, noise: float) -> dict[str, list[Energies]]:
    """By span, the energies of every step of one period, every round, and the run: of slots that have noise in it."""
    per_step: dict[frozenset[str], Energies] = {}
    per_round: list[Energies] = []
    whole: dict[str, float] = {}
    for server_round, rate in _rates(settings, method, layout, noise):
        now = Round(settings, method, layout, server_round, {}, noise, settings.sites_per_round)
        square = (rate * noise) ** 2
        each = {n: square * math.prod(slot.shape) * (kept_by(method.filter, slot) or 0.0) for n, slot in layout.items()}
        for mask in method.schedule.masks(layout, server_round, settings.train.local_steps, {}):
            per_step.setdefault(mask, {name: each[name] for name in mask})
        per_round.append({name: times * each[name] for name, times in trained_times(now).items() if times})
        for name, energy in per_round[-1].items():
            whole[name] = whole.get(name, 0.0) + energy
    return {"step": list(per_step.values()), "round": per_round, "run": [whole]}


def _rates(settings: Settings, method: Method, layout: Layout, noise: float) -> Iterator[tuple[int, float]]:
    """The rounds of the method, and the learning rate of each."""
    step = ServerStep(settings, layout, method) if method.server_steps else None
    for server_round in range(1 + settings.ridge_first, settings.num_rounds + 1):
        yield server_round, step.rate(server_round, noise) if step else rate_for(settings, method, layout, noise)


def _amplified(scale: float, A: str, B: str, spans: Mapping[str, list[Energies]], adapter: Mapping[str, Tensor]) -> Amplified:
    """Of a layer; of many steps or rounds the root of the mean square over those with noise in either factor."""
    rank = len(adapter[A])
    of_A, of_B = (float(adapter[name].double().square().sum()) for name in (A, B))
    product, linear = {}, {}
    for span, energies in spans.items():
        own = [e for e in energies if A in e or B in e]
        squares = [e.get(A, 0.0) * e.get(B, 0.0) for e in own] or [0.0]
        sums = [of_B * e.get(A, 0.0) + of_A * e.get(B, 0.0) for e in own] or [0.0]
        product[span] = scale * math.sqrt(statistics.fmean(squares) / rank)
        linear[span] = scale * math.sqrt(statistics.fmean(sums) / rank)
    return Amplified(product, linear)


def _together(layers: Collection[Amplified]) -> Amplified:
    def all_of(kind: str, span: str) -> float:
        return math.hypot(*(getattr(layer, kind)[span] for layer in layers))

    return Amplified(*({span: all_of(kind, span) for span in SPANS} for kind in ("product", "linear")))
