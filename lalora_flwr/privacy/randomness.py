"""Where a site's noise and sampling come from.

A real site draws from the operating system, whatever the run's seed: nobody who knows the seed can subtract the noise,
and a restarted run never repeats it. Only a simulation draws from the seed, and everything it writes says ``seeded``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lalora_flwr.ground.seeds import derive_seed


class RandomSource(Protocol):
    """Independent draws for one site in one round."""

    seeded: bool

    def normal(self, shape: torch.Size) -> Tensor:
        """Independent N(0, 1) draws, float64, on the CPU."""

    def uniform(self, n: int) -> Tensor:
        """``n`` independent draws from [0, 1), float64, on the CPU."""


class SystemRandom:
    """Draws from the operating system's cryptographic generator; cannot be seeded or replayed.

    Guarantee: the normal draws are Box-Muller in float64. The radius comes from a uniform of 106 bits, so the tail reaches
    to 12 standard deviations without gaps. What makes the low bits of a release harmless is the grid of
    `lalora_flwr.privacy.mechanism.noised_on_grid`.
    """

    seeded = False

    def __init__(self, entropy: Callable[[int], bytes] = os.urandom) -> None:
        """``entropy``: makes a number of random bytes; the guarantee is that of the default."""
        self._entropy = entropy

    def uniform(self, n: int) -> Tensor:
        bits = np.frombuffer(self._entropy(8 * n), dtype=np.uint64) >> np.uint64(11)
        return torch.from_numpy(bits.astype(np.float64) * 2.0**-53)

    def normal(self, shape: torch.Size) -> Tensor:
        n = math.prod(shape)
        half = (n + 1) // 2
        uniform = (1 - self.uniform(half)) - self.uniform(half) * 2.0**-53  # in (0, 1], its small values with all their bits
        radius = torch.sqrt(-2 * torch.log(uniform))
        angle = 2 * math.pi * self.uniform(half)
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:n].reshape(shape)


class SeededRandom:
    """Reproducible draws for simulations: separate streams for sampling and noise, one for each seed, site and round.

    The generator is numpy's, which uses all 64 bits of a seed: torch's on the CPU uses 32, and streams would meet.
    """

    seeded = True

    def __init__(self, seed: int, site: int, server_round: int, attempt: int = 1) -> None:
        again = (attempt,) if attempt > 1 else ()  # a round that is repeated has other draws
        self._sampling = np.random.default_rng(derive_seed(seed, "sampling", site, server_round, *again))
        self._noise = np.random.default_rng(derive_seed(seed, "noise", site, server_round, *again))

    def uniform(self, n: int) -> Tensor:
        return torch.from_numpy(self._sampling.random(n))

    def normal(self, shape: torch.Size) -> Tensor:
        return torch.from_numpy(np.asarray(self._noise.standard_normal(tuple(shape))))

    def normal_in_a_row(self, n: int) -> Tensor:
        """The ``n`` draws that calls of `normal` for tensors of together so many entries would give, one after the other."""
        return torch.from_numpy(self._noise.standard_normal(n))


def poisson_sample(source: RandomSource, records: int, sample_rate: float) -> Tensor:
    """Indices of the records that join a step: each independently with probability ``sample_rate``; possibly none.

    Guarantee: Poisson sampling, as the accountant assumes. The rate must not depend on private records.
    """
    return torch.nonzero(source.uniform(records) < sample_rate).flatten()
