"""Where a site's noise and sampling come from.

A real site draws from the operating system, whatever the run's seed: nobody who knows the seed can subtract the noise,
and a restarted run never repeats it. Only a simulation draws from the seed, and everything it writes says ``seeded``.
"""

from __future__ import annotations

import hashlib
import math
import os
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class RandomSource(Protocol):
    """Independent draws for one site in one round."""

    seeded: bool

    def normal(self, shape: torch.Size) -> Tensor:
        """Independent N(0, 1) draws, float32, on the CPU."""

    def uniform(self, n: int) -> Tensor:
        """``n`` independent draws from [0, 1), float64, on the CPU."""


class SystemRandom:
    """Draws from the operating system's cryptographic generator; cannot be seeded or replayed.

    Guarantee: the normal draws are Box-Muller on 53-bit uniforms in float64, rounded once to float32. This is not a
    defence against attacks on floating-point noise (Mironov 2012); `docs/privacy.md` says so.
    """

    seeded = False

    def uniform(self, n: int) -> Tensor:
        bits = np.frombuffer(os.urandom(8 * n), dtype=np.uint64) >> np.uint64(11)
        return torch.from_numpy(bits.astype(np.float64) * 2.0**-53)

    def normal(self, shape: torch.Size) -> Tensor:
        n = math.prod(shape)
        half = (n + 1) // 2
        radius = torch.sqrt(-2 * torch.log1p(-self.uniform(half)))  # 1 - u lies in (0, 1]
        angle = 2 * math.pi * self.uniform(half)
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:n].to(torch.float32).reshape(shape)


class SeededRandom:
    """Reproducible draws for simulations: separate streams for sampling and noise, own to a seed, site and round."""

    seeded = True

    def __init__(self, seed: int, site: int, server_round: int) -> None:
        self._sampling = torch.Generator().manual_seed(derive_seed(seed, "sampling", site, server_round))
        self._noise = torch.Generator().manual_seed(derive_seed(seed, "noise", site, server_round))

    def uniform(self, n: int) -> Tensor:
        return torch.rand(n, generator=self._sampling, dtype=torch.float64)

    def normal(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self._noise)


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose: unrelated for different purposes, the same on every machine."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def poisson_sample(source: RandomSource, records: int, sample_rate: float) -> Tensor:
    """Indices of the records that join a step: each independently with probability ``sample_rate``; possibly none.

    Guarantee: Poisson sampling, as the accountant assumes. The rate must not depend on private records.
    """
    return torch.nonzero(source.uniform(records) < sample_rate).flatten()
