"""Dynamic rank: only components above the noise train, and one more to look for the next. The server tells from what is released.

    site i:   holds k rows of A and k columns of B of each layer; trains B; sends B_i.  Gradients are clipped over these, and
              a component that is not held gets no noise
    server:   D_i = B_i - B;  s = mean over i ≠ j of ⟨D_i, D_j⟩;  v = max(mean ‖D_i‖² - s, 0) / (sites · m k);  V = V + v ‖A‖² / k
              U Σ Vᵀ = mean(B_i) A;  A = Vᵀ, then the rest of A's own row space, orthonormal;  B = U Σ
              c = how many σ_j > √V (√m + √k);  k = c + 1, at most r;  columns of B beyond k are zero

v is the noise on an entry of the mean, and of whatever else the sites disagree in: sites draw noise apart from each other, so
products of two sites' steps have none of it in the mean (‖A‖² / k is 1 once A's rows are orthonormal). √V (√m + √k) is the
largest singular value of a matrix of such noise alone. The component after the last clear one goes on from round to round until
it is clear or falls behind. In rounds 1, 6, 11, … all r train, since what one direction finds of the others is little and late.

Everything the server uses is released, and the directive, k of each layer, is public: safe under record-level DP whatever k it
names, since a site takes none but 1 … r, and clips and noises all that trains. It needs each site's update, of at least two
sites, and so no secure sum. No paper publishes this rule: LA-LoRA's (arXiv 2602.19926) names dynamic rank as future work, and
FedSVD's (arXiv 2505.12805) has the turning of factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from lalora_flwr.adapter.slots import LORA_A, LORA_B, Layout, Mask, factors_of
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.methods.merges import Memory, Merge, Merged, Now
from lalora_flwr.methods.method import Method
from lalora_flwr.methods.schedules import Schedule
from lalora_flwr.methods.travel import EVERYTHING_DOWN
from lalora_flwr.methods.updates import Tensors, Updates
from lalora_flwr.settings import Settings
from lalora_flwr.settings.schema import MergeSettings
from lalora_flwr.wire.public import Public

LOOK_EVERY = 5  # rounds; all components train in the next one
RANKS = "ranks"  # of the directive: components by layer
Float64 = NDArray[np.float64]


class Leading(Schedule):
    """All but A, of the components that the server names: ``{"ranks": {layer: k}}``, every layer once; with no word all."""

    text, period = "dynamic-rank", 1

    def fits(self, layout: Layout) -> None:
        if not list(factors_of(layout)):
            raise ConfigError(f"lora.schedule = {self.text!r}: the form has no factors, and so no rank")

    def mask(self, layout: Layout, server_round: int, step: int, directive: Public) -> Mask:
        return self.ever(layout)

    def ever(self, layout: Layout) -> Mask:
        return layout.trainable - layout.of(LORA_A)

    def within(self, layout: Layout, directive: Public) -> Layout:
        for layer, rank in self._named(directive).items():
            layout = layout.resized(LORA_A, axis=0, size=rank, layer=layer).resized(LORA_B, axis=1, size=rank, layer=layer)
        return layout

    def accepts(self, layout: Layout, directive: Public) -> bool:
        most = {layout[A].layer: layout[A].shape[0] for A, _ in factors_of(layout)}
        named = self._named(directive)
        if not directive or set(directive) != {RANKS} or named.keys() != most.keys():
            return not directive
        return all(type(rank) is int and 1 <= rank <= most[layer] for layer, rank in named.items())

    def _named(self, directive: Public) -> dict[str, int]:
        ranks = directive.get(RANKS)
        return {layer: rank for layer, rank in ranks.items() if isinstance(rank, int)} if isinstance(ranks, Mapping) else {}


class AboveNoise(Merge):
    """The mean, in factors of its singular value decomposition, as far as it stands out of the noise."""

    name = "above-noise"
    needs_parts = frozenset({LORA_A, LORA_B})
    moves_frozen, rewrites, steers = True, True, True

    def least_updates(self, settings: MergeSettings) -> int:
        return 2

    def __call__(self, current: Tensors, updates: Updates, memory: Memory, now: Now) -> Merged:
        tensors: dict[str, Float64] = {}
        walked, ranks = dict(memory.tensors), {}
        pairs = dict(factors_of(now.layout))
        for name in updates.each[0].tensors.keys() - set(pairs.values()):  # a trained head
            tensors[name] = np.mean([update.tensors[name] for update in updates.each], axis=0, dtype=np.float64)
        for name_A, name_B in pairs.items():
            sent = [update.tensors[name_B].astype(np.float64) for update in updates.each]
            k = sent[0].shape[1]
            A, before = current[name_A].astype(np.float64), current[name_B][:, :k]
            noise = noise_of_mean([one - before for one in sent]) * float((A[:k] ** 2).sum()) / k
            walked[name_B] = walked.get(name_B, np.zeros(())) + noise
            A, B, values = in_order(A, np.mean(sent, axis=0))
            clear = int((values > edge(float(walked[name_B]), len(B), k)).sum())
            most = min(len(A), len(B), A.shape[1])
            kept = min(clear + 1, most)
            B[:, kept:] = 0
            ranks[now.layout[name_B].layer] = most if now.server_round % LOOK_EVERY == 0 else kept
            tensors[name_A], tensors[name_B] = A, B
        merged = {name: value.astype(np.float32) for name, value in tensors.items()}
        return Merged(merged, Memory(tensors=walked), {RANKS: ranks}, rewritten=True)


def noise_of_mean(moved: list[Float64]) -> float:
    """The variance of the noise on an entry of the mean of sites' steps, from how little they agree.

    Unbiased, but for the bound at 0, where the noise of a site has one variance on all its entries and is independent of the
    others'.
    """
    n = len(moved)
    squares = sum(float((one**2).sum()) for one in moved)
    products = (float((np.sum(moved, axis=0) ** 2).sum()) - squares) / (n * (n - 1))  # mean over ordered pairs of two sites
    return max(squares / n - products, 0.0) / (n * moved[0].size)


def edge(variance: float, m: int, k: int) -> float:
    """About the largest singular value of an (m, k) matrix of independent entries of this variance."""
    return math.sqrt(variance) * (math.sqrt(m) + math.sqrt(k))


def in_order(A: Float64, B: Float64) -> tuple[Float64, Float64, Float64]:
    """Factors of the product B A_k by its singular values, A_k being as many rows of A as B has columns.

    Args:
        A: of shape (r, n); all its rows.
        B: of shape (m, k).

    Returns:
        A of orthonormal rows with the same span as before, of which the first make the product; where r is above n the rows
        beyond n are zero. B of shape (m, r), zero beyond the product's rank. The singular values.
    """
    r, (m, k) = len(A), B.shape
    Q, R = np.linalg.qr(A.T)  # (n, p), (p, r)
    U, S, W = np.linalg.svd(B @ R[:, :k].T, full_matrices=False)  # (m, j), (j,), (j, p)
    whole, _ = np.linalg.qr(W.T, mode="complete")  # (p, p), its first j columns W's rows up to signs
    rows = np.vstack([W, whole[:, len(W) :].T]) @ Q.T
    new_A, new_B = np.zeros((r, A.shape[1])), np.zeros((m, r))
    new_A[: len(rows)], new_B[:, : len(S)] = rows[:r], U * S
    return new_A, new_B, S


class DynamicRank(Method):
    """The method, whose server steers its own schedule."""

    def check(self, settings: Settings) -> None:
        super().check(settings)
        for key, value in (("lora.schedule", settings.lora.schedule), ("merge.name", settings.merge.name)):
            if value != "auto":
                raise ConfigError(
                    f"{key} = {value!r}: must be 'auto' for strategy = 'dynamic-rank', whose server says what trains"
                )


METHOD = DynamicRank(schedule=Leading(), travel=EVERYTHING_DOWN, merge=AboveNoise())
