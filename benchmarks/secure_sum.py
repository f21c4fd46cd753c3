"""What masks cost a site: seconds beside those of its noise, by sites and parameters. python -m benchmarks.secure_sum"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.machine import processor
from lalora_flwr.privacy.mechanism import Share, noised_units
from lalora_flwr.privacy.randomness import SystemRandom
from lalora_flwr.wire.sharing import Member, Secrets, SharingRoster, masked, public_bytes, seeded_key

REPEATS = 5


def seconds(work: Callable[[], object]) -> float:
    """Median of a few times."""
    taken = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def main() -> None:
    torch.set_num_threads(1)
    print(f"{processor()}, one thread")
    print("| parameters | noise, ms | masks of 3 other sites | 7 | 19 | 255 |\n|---|---|---|---|---|---|")
    for parameters in (30_000, 300_000, 3_000_000):
        share = Share(0.5, 1.0, 4)
        total = torch.zeros(parameters, dtype=torch.float64)
        noise = seconds(lambda total=total, share=share: noised_units(total, share.std, share.step, SystemRandom(), share.most))
        cells = []
        for sites in (4, 8, 20, 256):
            if sites * parameters > 3e8:
                cells.append("")
                continue
            keys = [seeded_key(0, site) for site in range(sites)]
            roster = SharingRoster.of(Member(str(i), public_bytes(key)) for i, key in enumerate(keys))
            units = {"w": np.zeros(parameters, dtype=np.int64)}
            own = Secrets(keys[0], roster, "1")
            spent = seconds(lambda u=units, o=own: masked(u, o, o.roster, {"attempt": 1}))
            cells.append(f"{spent * 1e3:.1f} ms, {spent / noise:.2f} x")
        print(f"| {parameters:,} | {noise * 1e3:.1f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
