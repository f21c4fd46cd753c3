"""AS-LoRA (arXiv 2605.05769): the server says for each layer whether A or B trains next, by scores of what the sites released.

    server, warm-up (a tenth of the rounds, at least two):  all layers B, then all layers A, …
            after it, each layer ℓ:  d = (S_A - S_B) / (S_A + S_B);  A with probability p = (1 - e) sigmoid(d / T) + e / 2, else B
            T = max(0.1, 0.95^t), t being the rounds after the warm-up;  e = 0.1;  sends the choice to the sites
    site i: trains the chosen factor of each layer, the other frozen;  sends what it trained
    server: X = mean of X_i;   s = max(‖Δ_X‖² - numel(X) τ², 0);   S_X = 0.9 S_X + 0.1 s, the first time s

Δ_X is the mean update of the factor, or where the server steps its mean gradient, and τ the standard deviation of the noise on an
entry of it, which the server knows (`Now.noise`): numel(X) τ² is what noise alone would give, over all sites and local steps. K
steps at the rate η make Δ η K times a gradient for both factors alike, so that d does not depend on either. A factor that does
not train keeps its score, which grows old: hence the exploration by e, which is ours.

Safe under record-level DP in this form: scores are post-processing of released tensors. Left out: the paper's score with
curvature, whose finite differences are taken of the raw loss on private records.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lalora_flwr.adapter.slots import LORA_A, LORA_B, Layout, Mask, factors_of
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.seeds import derive_seed
from lalora_flwr.methods.merges import Mean, Memory, Merged, Now
from lalora_flwr.methods.method import Method, unknown_noise
from lalora_flwr.methods.schedules import Schedule
from lalora_flwr.methods.travel import TRAINED
from lalora_flwr.methods.updates import Tensors, Updates
from lalora_flwr.settings import Settings
from lalora_flwr.wire.public import Public

WARM_UP, LEAST_WARM_UP = 0.1, 2  # share of the rounds, and rounds in which both factors get a score
KEEP = 0.9  # of a score, when its factor trains
COOLING, COLDEST = 0.95, 0.1  # of the temperature, which starts at 1
EXPLORE = 0.1  # e: so each factor of a layer trains at least once in twenty rounds on average
A = "A"  # what a directive has: the layers that train A, sorted; all others train B
ROUNDS, SCORES, TIMES = "rounds", "scores", "times"  # of the memory


class ByLayer(Schedule):
    """In each layer the factor that the directive names, at every step of the round; what is no factor trains always."""

    text, period = "as-lora", 1

    def fits(self, layout: Layout) -> None:
        if not layers_of(layout):
            raise ConfigError("strategy = 'as-lora': the form has no layer with lora_A and lora_B to choose from")

    def mask(self, layout: Layout, server_round: int, step: int, directive: Public) -> Mask:
        chosen = directive[A]
        assert isinstance(chosen, Sequence)
        still = {name_B if layout[name_A].layer in chosen else name_A for name_A, name_B in factors_of(layout)}
        return layout.trainable - still

    def accepts(self, layout: Layout, directive: Public) -> bool:
        chosen = directive.get(A)
        if set(directive) != {A} or not isinstance(chosen, list) or not all(isinstance(layer, str) for layer in chosen):
            return False
        return chosen == sorted(set(chosen)) and set(chosen) <= set(layers_of(layout))

    def foreseen(self, layout: Layout, server_round: int, directive: Public) -> Public:
        return everywhere(layout, a=server_round % 2 == 0)


def layers_of(layout: Layout) -> list[str]:
    """Layers with both factors, in order."""
    return [layout[name_A].layer for name_A, _ in factors_of(layout)]


def everywhere(layout: Layout, *, a: bool) -> Public:
    """The directive by which all layers train A, or all of them B."""
    return {A: sorted(layers_of(layout)) if a else []}


class Scored(Mean):
    """The mean, and a directive by the scores of what it is the mean of."""

    name = "as-lora"
    needs_parts = frozenset({LORA_A, LORA_B})
    steers = True

    def start(self, layout: Layout) -> Public:
        return everywhere(layout, a=False)  # at B = 0 the gradient of A is zero

    def __call__(self, current: Tensors, updates: Updates, memory: Memory, now: Now) -> Merged:
        merged = super().__call__(current, updates, memory, now)
        pairs = list(factors_of(now.layout))
        zero = np.zeros((len(pairs), 2))
        scores = np.array(memory.tensors.get(SCORES, zero))  # of A and B of each layer
        times = np.array(memory.tensors.get(TIMES, zero))  # that they trained
        for layer, names in enumerate(pairs):
            for factor, name in enumerate(names):
                if name in merged.tensors:
                    new = score(updates.total[name] / updates.count, current[name], name, now)
                    scores[layer, factor] = KEEP * scores[layer, factor] + (1 - KEEP) * new if times[layer, factor] else new
                    times[layer, factor] += 1
        served = memory.notes.get(ROUNDS, 0)
        assert isinstance(served, int)
        kept = Memory({ROUNDS: served + 1}, {SCORES: scores, TIMES: times})
        return Merged(merged.tensors, kept, directive_after(served + 1, scores, now))


def score(mean: NDArray[np.float64], start: NDArray[np.floating], name: str, now: Now) -> float:
    """‖Δ‖² of a factor's mean update or gradient, less what its noise alone would give; at least 0."""
    assert now.noise is not None  # `AsLora.check` sees to it
    moved = mean if now.gradients else mean - start
    return max(0.0, float(np.square(moved).sum()) - moved.size * now.noise[name] ** 2)


def directive_after(served: int, scores: NDArray[np.float64], now: Now) -> Public:
    """How the round after a number of merged ones is steered."""
    warm = max(LEAST_WARM_UP, math.ceil(WARM_UP * now.rounds))
    if served < warm:
        return everywhere(now.layout, a=served % 2 == 1)
    p = probability_of_a(scores, max(COLDEST, COOLING ** (served - warm)))
    draws = np.random.default_rng(derive_seed(now.seed, "as-lora", now.server_round)).random(len(p))
    return {A: sorted(layer for layer, draw, chance in zip(layers_of(now.layout), draws, p, strict=True) if draw < chance)}


def probability_of_a(scores: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """p of each layer.

    Args:
        scores: of A and B, (layers, 2), not negative.
        temperature: T.
    """
    total = scores.sum(1)
    d = np.divide(scores[:, 0] - scores[:, 1], total, out=np.zeros(len(scores)), where=total > 0)
    return np.asarray((1 - EXPLORE) / (1 + np.exp(-d / temperature)) + EXPLORE / 2)


@dataclass(frozen=True)
class AsLora(Method):
    """The method, which has to know the noise of what it scores."""

    def check(self, settings: Settings) -> None:
        super().check(settings)
        if settings.lora.schedule != "auto":
            raise ConfigError(
                f"lora.schedule = {settings.lora.schedule!r}: must be 'auto' for strategy = 'as-lora', which chooses"
            )
        if settings.merge.name != "auto":
            raise ConfigError(
                f"merge.name = {settings.merge.name!r}: must be 'auto' for strategy = 'as-lora', which keeps scores"
            )
        if settings.merge.max_update_norm:
            raise ConfigError(
                f"merge.max-update-norm = {settings.merge.max_update_norm:g}: must be 0 for strategy = 'as-lora': the noise of "
                "a scaled update is not known"
            )
        if not settings.server_steps and (unknown := unknown_noise(self.of(settings), settings)):
            raise ConfigError(
                f"{unknown}: strategy = 'as-lora' does not know the noise of such an update; leave it out, or set "
                "train.local-steps = 1 and train.step-at = 'server'"
            )


METHOD = AsLora(schedule=ByLayer(), travel=TRAINED, merge=Scored())
