"""The bound on what a record adds to a step's sum."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

BLOCK = 1 << 16  # elements that are float64 at once while gradients are clipped: as many as a core's cache holds
SMALL = 1 << 19  # elements that are one block all the same: a second pass over them would cost more than the larger cache
GPU_BLOCK = 1 << 22  # on a GPU, where each block costs the start of a few kernels


def clip(per_sample: Mapping[str, Tensor], clip_norm: float, stability: float = 0.0) -> tuple[dict[str, Tensor], int]:
    """Sum of the per-sample gradients, each scaled to a joint L2 norm of at most ``clip_norm``.

    A gradient g is multiplied by min(1, C / ‖g‖); with a ``stability`` γ > 0 by C / (‖g‖ + γ) (AUTO-S, arXiv 2206.07136), which
    normalises small gradients too, so that C becomes a part of the learning rate.

    Guarantee: adding or removing one record moves the sums, taken as one vector, by at most ``clip_norm`` (1 + 1e-9),
    whatever the scale of ``clip_norm`` and of the gradients. Norms, factors and sums are float64: squares of any float32
    neither underflow nor overflow there. A record whose norm is not finite, or is 0 though its entries are not,
    contributes zero. ``clip_norm = inf`` only drops those.

    Args:
        per_sample: tensors of shape (records, *parameter.shape), of any floating type.
        clip_norm: C > 0.
        stability: γ, in the unit of the gradients.

    Returns:
        The sums, float64, of the parameters' shapes; and how many records were not finite (for the site's log only).
    """
    blocks = list(_blocks(per_sample)) if _is_small(per_sample) else None  # one: made once
    squares = sum(part.square().sum(1) for _, part in blocks or _blocks(per_sample))
    norms = torch.as_tensor(squares).sqrt()  # (records,)
    finite = torch.isfinite(norms)
    usable = finite & (norms > 0)
    scaled = clip_norm / (norms + stability) if stability else (clip_norm / norms).clamp(max=1.0)
    factors = torch.where(usable, scaled, 0.0)
    useless = None if usable.all() else ~usable.unsqueeze(1)
    sizes = [math.prod(g.shape[1:]) for g in per_sample.values()]
    total = torch.empty(sum(sizes), dtype=torch.float64, device=norms.device)
    for columns, part in blocks or _blocks(per_sample):
        total[columns] = factors @ (part if useless is None else part.masked_fill_(useless, 0.0))  # 0 · inf would be NaN
    pieces = zip(per_sample.items(), torch.split(total, sizes), strict=True)
    return {name: piece.view(g.shape[1:]) for (name, g), piece in pieces}, int((~finite).sum())


def _blocks(per_sample: Mapping[str, Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Gradients (records, *shape) side by side, as float64 copies (records, columns), block by block, with their columns."""
    if per_sample and _is_small(per_sample):
        whole = torch.cat([g.flatten(1) for g in per_sample.values()], 1).to(torch.float64, copy=True)
        yield slice(0, whole.shape[1]), whole
        return
    waiting: list[Tensor] = []
    start = wide = 0  # small tensors wait for each other: a block of many costs what one of few does
    for g in per_sample.values():
        rows = g.flatten(1)
        most = max(1, (GPU_BLOCK if g.is_cuda else BLOCK) // max(1, rows.shape[0]))
        for piece in torch.split(rows, most, 1):
            if waiting and wide + piece.shape[1] > most:
                yield slice(start, start + wide), _in_float64(waiting)
                start, waiting, wide = start + wide, [], 0
            waiting.append(piece)
            wide += piece.shape[1]
    if waiting:
        yield slice(start, start + wide), _in_float64(waiting)


def _is_small(per_sample: Mapping[str, Tensor]) -> bool:
    """Whether they are one block."""
    return sum(g.numel() for g in per_sample.values()) <= SMALL


def _in_float64(pieces: Sequence[Tensor]) -> Tensor:
    """(records, columns) each, side by side, as a copy."""
    return pieces[0].to(torch.float64, copy=True) if len(pieces) == 1 else torch.cat([p.to(torch.float64) for p in pieces], 1)
