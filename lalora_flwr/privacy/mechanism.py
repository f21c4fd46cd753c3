"""One step's release: clip each record, sum, add noise on a grid, divide by the expected batch size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lalora_flwr.privacy.clip import clip
from lalora_flwr.privacy.counting import Ledger
from lalora_flwr.privacy.randomness import RandomSource, SeededRandom

SMALLEST, LARGEST = 2.0**-149, float(torch.finfo(torch.float32).max)  # of float32, and so of C
GRID_BITS = 17  # the grid of the released sums is at most 2^-17 of the noise's standard deviation
SHARED_BITS = 28  # the same for sums that several sites share
MOST_SITES = 1 << 12  # that share one noise
FINE = 2.0**-40  # of the noise: a second draw, so small, decides what float64 cannot resolve in the first
EXACT = 2.0**52  # grid units that float64 holds exactly, with room for the noise
APART = 0.44  # share of C of what is clipped apart; all else has √(1 - 0.44²), so that both together have C


@dataclass(frozen=True)
class Mechanism:
    """The public constants of a site's steps; none of them may come from private records.

    Attributes:
        noise_multiplier: σ; the noise on the sum has standard deviation σC. 0: no clip and no noise (not private).
        clip_norm: C, the L2 bound on one record's gradient over all active tensors together; within float32's range.
        sample_rate: q, each record's probability of joining a step.
        expected_batch: the fixed divisor of the sum, in records.
        stability: γ of `clip`; 0: records within C are left as they are.
        apart: a part of the tensors' dotted names, as lora_A. A record's gradient of the tensors that have it is clipped to
            `APART` C, and that of all others to what leaves C for both. "": all together.

    Raises:
        ValueError: for constants that cannot be a mechanism's.
    """

    noise_multiplier: float
    clip_norm: float
    sample_rate: float
    expected_batch: float
    stability: float = 0.0
    apart: str = ""

    def __post_init__(self) -> None:
        sigma_good = self.noise_multiplier == 0 or 1e-9 <= self.noise_multiplier <= 1e9
        rates_good = 0 < self.sample_rate <= 1 and 0 < self.expected_batch < math.inf
        rates_good &= 0 <= self.stability <= 1
        if not (sigma_good and SMALLEST <= self.clip_norm <= LARGEST and rates_good):
            raise ValueError(f"no constants of a mechanism: {self}")

    @property
    def private(self) -> bool:
        return self.noise_multiplier > 0

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on every entry of the sum, σC."""
        return self.noise_multiplier * self.clip_norm

    def bounds(self, names: Iterable[str]) -> list[tuple[list[str], float]]:
        """The tensors of a step that are clipped together, and the L2 bound of each group.

        Guarantee: the squares of the bounds add up to C² at most, so that all of a record's gradient has the norm C at most.
        """
        if not self.private:
            return [(list(names), math.inf)]
        own = {name: bool(self.apart) and self.apart in name.split(".") for name in names}
        if len(set(own.values())) < 2:
            return [(list(own), self.clip_norm)]
        shares = ((True, APART), (False, math.sqrt(1 - APART**2)))
        return [([name for name in own if own[name] is kind], share * self.clip_norm) for kind, share in shares]


def grid_step(std: float, bits: int = GRID_BITS) -> float:
    """The spacing of the grid for noise of a standard deviation: the largest power of two of at most 2^-bits of it."""
    return math.ldexp(1.0, math.frexp(std)[1] - 1 - bits)


def noised_on_grid(total: Tensor, std: float, source: RandomSource) -> Tensor:
    """``total`` + N(0, std²) on every entry, rounded to the multiples of `grid_step` (std).

    Guarantee: the result is what rounding does to a Gaussian mechanism's output, so it is post-processing of it: which
    numbers can come out, and how likely each is, depends on ``total`` as a Gaussian's output does, and nothing is left in
    the low bits (Mironov 2012). `docs/privacy.md` has the argument, and what float64 adds to it.

    Whole grid units and fractions are added apart: whole ones exactly, fractions to 2^-51 of a unit, and the fine second
    draw decides on which side of a rounding boundary a sum falls that the first draw leaves within its own precision.

    Args:
        total: float64, any shape. Entries are first limited to ±2^52 units, which moves no two of them apart.
        std: standard deviation of the noise, above 0.
        source: of two normal draws for every entry.
    """
    step = grid_step(std)
    return noised_units(total, std, step, source) * step


def noised_units(total: Tensor, std: float, step: float, source: RandomSource, most: float = EXACT) -> Tensor:
    """As `noised_on_grid`, in whole units of a grid ``step``, a power of two; entries of ``total`` limited to ±``most`` units.

    Guarantee: each entry is that of ``total`` + N(0, std²) independent of all others, rounded to a whole unit.
    """
    units = (total / step).clamp(-most, most)  # exact: the step is a power of two
    noise = source.normal(total.shape).to(total.device) * (std / step)
    fine = source.normal(total.shape).to(total.device) * (std / step * FINE)
    whole, more = units.floor(), noise.floor()
    fractions = (units - whole) + (noise - more) + fine
    return whole + more + (fractions + 0.5).floor()


@dataclass(frozen=True)
class Share:
    """A site's part of a noise that several share, and the grid on which their sums meet.

    Attributes:
        multiplier: s; each adds noise of standard deviation sC to its own sum.
        clip_norm: C.
        sites: how many sum.

    Raises:
        ValueError: for numbers with which the sum could leave the grid.
    """

    multiplier: float
    clip_norm: float
    sites: int

    def __post_init__(self) -> None:
        good = 1e-6 <= self.multiplier <= 1e6 and SMALLEST <= self.std <= LARGEST and 1 <= self.sites <= MOST_SITES
        if not good:
            raise ValueError(f"no share of a noise: {self}")

    @property
    def std(self) -> float:
        """Standard deviation of the site's own noise."""
        return self.multiplier * self.clip_norm

    @property
    def step(self) -> float:
        """The grid's spacing, a power of two of at most 2^-28 of the noise: rounding before the sum is then as good as after."""
        return grid_step(self.std, SHARED_BITS)

    @property
    def most(self) -> float:
        """Units to which a site's own sum is limited, so that n of them and their noise stay below 2^53."""
        return EXACT / self.sites


class PrivateSum:
    """Collects clipped gradients of one step and lets them out only with noise.

    Guarantee: `release` is the Poisson-subsampled Gaussian mechanism with the constants of ``mechanism``, provided that
    `add` got each sampled record once. The sum without noise is never returned, and the ledger counts the step first.
    """

    def __init__(self, mechanism: Mechanism, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        self._mechanism, self._shapes, self._device = mechanism, dict(shapes), device
        self._bounds = mechanism.bounds(shapes)
        self._sums: dict[str, Tensor] = {}  # made with the first batch: nothing is held through its forward pass
        self.not_finite = 0  # records that contributed zero; stays on the site

    def add(self, per_sample: Mapping[str, Tensor]) -> None:
        """Clip and add a physical batch, tensors of shape (records, *shape); names must be exactly those of the step."""
        if per_sample.keys() != self._shapes.keys():
            raise RuntimeError("the gradients are not those of the step's active tensors")
        stability = self._mechanism.stability if self._mechanism.private else 0.0
        found = [clip({n: per_sample[n] for n in names}, bound, stability) for names, bound in self._bounds]
        self.not_finite += max(count for _, count in found)
        for name, value in itertools.chain.from_iterable(sums.items() for sums, _ in found):
            if name in self._sums:
                self._sums[name] += value
            else:
                self._sums[name] = value

    def release(self, ledger: Ledger, source: RandomSource) -> dict[str, Tensor]:
        """The noised mean gradient, float32. Also right for an empty batch: pure noise, counted like any step."""
        total, shapes = self._taken(ledger)
        if self._mechanism.private:
            total = noised_on_grid(total, self._mechanism.noise_std, _SlotBySlot(source, shapes))
        return _apart((total / self._mechanism.expected_batch).to(torch.float32), shapes)

    def release_share(self, ledger: Ledger, source: RandomSource, share: Share, kept: Collection[str] = ()) -> dict[str, Tensor]:
        """The sum with a share of the noise, in units of ``share.step``, int64, on the CPU: for a secure sum only.

        Guarantee: by itself the result has the noise sC, and no more. Under masks that cancel in the sum over n sites, of
        which n - t add their share, it is post-processing of the Poisson-subsampled Gaussian mechanism with noise
        sC√(n - t), up to a δ below 10^-1000 (``docs/secure_sum.md``). The tensors ``kept``, which are to stay at the site, have
        all of the site's own noise σC, or sC if that is more: the masked sum and they together are that same mechanism, if
        sC√(n - t) is at least σC.

        Returns:
            Of ``kept`` what `release` gives in place of units.
        """
        if not self._mechanism.private:
            raise RuntimeError("without clip and noise there is nothing to share")
        total, shapes = self._taken(ledger)
        pieces = dict(zip(shapes, torch.split(total, [shape.numel() for shape in shapes.values()]), strict=True))
        sent, own = ({n: s for n, s in shapes.items() if (n in kept) is stays} for stays in (False, True))
        row = torch.cat([total[:0], *(pieces[name] for name in sent)])
        shared = noised_units(row, share.std, share.step, _SlotBySlot(source, sent), share.most)
        found = _apart(shared.to("cpu", torch.int64), sent)
        if own:
            row, std = torch.cat([pieces[name] for name in own]), max(self._mechanism.noise_std, share.std)
            noised = noised_on_grid(row, std, _SlotBySlot(source, own))
            found |= _apart((noised / self._mechanism.expected_batch).to(torch.float32), own)
        return {name: found[name] for name in shapes}

    def _taken(self, ledger: Ledger) -> tuple[Tensor, dict[str, torch.Size]]:
        """The sums without their noise, one after the other in one row, once, after the ledger has counted the step."""
        ledger.take_step()
        shapes, self._shapes = self._shapes, {}  # a second release holds nothing
        sums, self._sums = self._sums, {}
        if not sums:
            return torch.zeros(sum(shape.numel() for shape in shapes.values()), dtype=torch.float64, device=self._device), shapes
        return torch.cat([sums[name].flatten() for name in shapes]), shapes


def _apart(row: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors that lie in a row one after the other, each in memory of its own."""
    pieces = torch.split(row, [shape.numel() for shape in shapes.values()])
    return {name: piece.view(shape).clone() for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


class _SlotBySlot:
    """Gives the draws for all tensors of a step at once, each drawn as if its tensor were alone: noise, then fine noise.

    Guarantee: each draw of ``source`` is given once.
    """

    def __init__(self, source: RandomSource, shapes: Mapping[str, torch.Size]) -> None:
        self.seeded = source.seeded
        if isinstance(source, SeededRandom):  # the same draws, without a call for each
            sizes = [shape.numel() for shape in shapes.values() for _ in range(2)]
            drawn = list(torch.split(source.normal_in_a_row(sum(sizes)), sizes))
        else:
            drawn = [source.normal(shape).flatten() for shape in shapes.values() for _ in range(2)]
        self._rows = [torch.cat(drawn[of::2]) if drawn else torch.empty(0) for of in (1, 0)]

    def normal(self, shape: torch.Size) -> Tensor:
        return self._rows.pop().view(shape)

    def uniform(self, n: int) -> Tensor:
        raise NotImplementedError("noise is normal")
