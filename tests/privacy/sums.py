"""Gradients of any size, and mechanisms to sum them with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lalora_flwr.privacy.mechanism import Mechanism
from tests.reference import generator

SHAPES = {"x.lora_A.w": (2, 7), "x.lora_B.w": (5, 2), "head.bias": (3,)}


CPU = torch.device("cpu")


def gradients(sizes: list[list[float]], seed: int = 0) -> dict[str, Tensor]:
    """One record a row of ``sizes``, one size a tensor; an infinite or NaN size spoils one element."""
    draw, out = generator(seed), {}
    for t, (name, shape) in enumerate(SHAPES.items()):
        rows = []
        for row in sizes:
            g = torch.randn(shape, generator=draw)
            if math.isfinite(row[t]):
                rows.append((g / g.norm()).double().mul(row[t]).float())
            else:
                g.view(-1)[-1] = row[t]
                rows.append(g)
        out[name] = torch.stack(rows) if rows else torch.zeros(0, *shape)
    return out


MECHANISM = Mechanism(noise_multiplier=1.7, clip_norm=0.6, sample_rate=0.25, expected_batch=13.0)


LARGE = {"x.lora_A.w": torch.Size((200, 101)), "x.lora_B.w": torch.Size((101, 200))}
