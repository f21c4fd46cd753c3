"""What clipping in float64 and noise on a grid cost, beside the same in float32 without a grid.

    python -m benchmarks.mechanism [cpu | cuda]

Milliseconds of one step on gradients that are there already, least of seven, one thread.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.machine import processor
from lalora_flwr.privacy.clip import clip
from lalora_flwr.privacy.mechanism import noised_on_grid
from lalora_flwr.privacy.randomness import SystemRandom

SIZES = {  # records, and the shapes of the tensors that train
    "digits, B, 40 records": (40, [(240, 4), (80, 4), (320, 4), (80, 4)] * 2),
    "RoBERTa-base, A, r = 16, 16 records": (16, [(16, 768)] * 48),
    "RoBERTa-base, B, r = 16, 16 records": (16, [(768, 16)] * 48),
}


def clip_in_float32(per_sample: dict[str, Tensor], bound: float) -> dict[str, Tensor]:
    norms = torch.stack([g.flatten(1).square().sum(1) for g in per_sample.values()]).sum(0).sqrt()
    factors = (bound / norms).clamp(max=1.0)
    return {name: torch.tensordot(factors, g, dims=1) for name, g in per_sample.items()}


def noise_in_float32(sums: dict[str, Tensor], source: SystemRandom) -> None:
    for total in sums.values():
        n = math.prod(total.shape)
        half = (n + 1) // 2
        radius, angle = torch.sqrt(-2 * torch.log1p(-source.uniform(half))), 2 * math.pi * source.uniform(half)
        drawn = torch.cat([radius * angle.cos(), radius * angle.sin()])[:n].float()
        total.float().add_(drawn.reshape(total.shape).to(total.device))


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    best = math.inf
    for _ in range(7):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return 1e3 * best


def main() -> None:
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    torch.set_num_threads(1)
    source = SystemRandom()
    print(torch.cuda.get_device_name() if device.type == "cuda" else processor())
    print(f"{'':<38} {'clip':>8} {'float32':>8}  {'noise':>8} {'float32':>8}")
    for name, (records, shapes) in SIZES.items():
        gradients = {str(i): torch.randn(records, *shape, device=device) for i, shape in enumerate(shapes)}
        sums = clip(gradients, 1.0)[0]
        works: list[Callable[[], object]] = [
            lambda g=gradients: clip(g, 1.0),
            lambda g=gradients: clip_in_float32(g, 1.0),
            lambda s=sums: [noised_on_grid(total, 1.0, source) for total in s.values()],
            lambda s=sums: noise_in_float32(s, source),
        ]
        found = [milliseconds(work, device) for work in works]
        print(f"{name:<38} {found[0]:>8.1f} {found[1]:>8.1f}  {found[2]:>8.1f} {found[3]:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
