"""A model in float32 for a while, whatever its weights are kept in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Weights and buffers widened in place to float32, no TF32; afterwards every bit is as before.

    Every bfloat16 or float16 number is a float32 number, so that the way there and back loses nothing. One tensor after
    the other changes and none is kept twice: the device must hold the weights once in float32, 28 GB for 7 billion.
    """
    narrow = [(t, t.dtype) for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.bfloat16, torch.float16)]
    precision = torch.get_float32_matmul_precision()
    try:
        for tensor, _ in narrow:
            tensor.data = tensor.data.float()
        torch.set_float32_matmul_precision("highest")
        with torch.backends.cudnn.flags(
            enabled=torch.backends.cudnn.enabled,
            benchmark=torch.backends.cudnn.benchmark,
            deterministic=torch.backends.cudnn.deterministic,
            allow_tf32=False,
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for tensor, dtype in narrow:
            tensor.data = tensor.data.to(dtype)
