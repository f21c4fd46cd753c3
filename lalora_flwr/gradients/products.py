"""Products of many rows with frozen weights, by the faster of the two libraries that PyTorch carries, and in few sizes.

PyTorch multiplies float32 matrices on x86 with Intel's MKL. On AMD's processors MKL keeps to vectors of 256 bits; oneDNN, which
PyTorch has for convolutions and bfloat16, uses those of 512 bits where a processor has them, and a float32 product then takes
less than half the time on one that computes with them whole (Zen 5; `docs/engine.md` has numbers). Both sum in float32.

oneDNN makes a kernel for each number of rows, which takes as long as a small product, and ever other sizes of its buffers leave
memory in pieces: a gigabyte after a thousand sizes. Batches drawn at random and texts of all lengths have as many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 96 * 96  # numbers in a weight: with fewer, oneDNN's longer start of about 10 microseconds costs more than it saves
LEAST_STEP = 8  # rows
LARGE = 1 << 15  # numbers of an input from which on its buffers matter, and filling it up costs next to nothing


def for_onednn() -> frozenset[torch.dtype]:
    """What this processor multiplies best with oneDNN: bfloat16 if it can, and float32 if it is AMD's with 512-bit vectors."""
    found: set[torch.dtype] = set()
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        processor = torch.cpu.get_capabilities()
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            found.add(torch.bfloat16)
        if processor.get("avx512_f") and str(processor.get("cpu_name", "")).startswith("AMD"):
            found.add(torch.float32)
    return frozenset(found)


class Kernels:
    """Which library computes the products of this process.

    Attributes:
        onednn: precisions in which oneDNN does, where a product is on the CPU and large enough; else whatever PyTorch takes.
    """

    def __init__(self, onednn: frozenset[torch.dtype]) -> None:
        self.onednn = onednn

    @contextmanager
    def left_to_pytorch(self) -> Iterator[None]:
        """All products by PyTorch's own choice."""
        before, self.onednn = self.onednn, frozenset()
        try:
            yield
        finally:
            self.onednn = before

    def take(self, rows: Tensor, weight: Tensor) -> bool:
        """Whether oneDNN computes this product: not by how many rows there are, which must not change a record's gradient."""
        return (
            weight.dtype in self.onednn
            and rows.dtype == weight.dtype
            and weight.numel() >= SMALLEST
            and rows.numel() > 0
            and rows.device.type == "cpu"
        )

    def product(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """rows weightᵀ + bias, no gradient: (…, in), (out, in), (out,) -> (…, out). The weight may be a transposed view."""
        return _by_onednn(rows, weight, bias) if self.take(rows, weight) else F.linear(rows, weight, bias)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`torch.nn.functional.linear`; by oneDNN only where weight and bias are frozen."""
        frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
        if not (frozen and self.take(x, weight)):
            return F.linear(x, weight, bias)
        y: Tensor = _Linear.apply(x, weight, bias)
        return y


def filled_up(rows: int) -> int:
    """So many rows are computed in place of ``rows`` of a large input: eight sizes between a power of two and the next."""
    step = max(LEAST_STEP, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // step) * step


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    count, whole = len(rows), filled_up(len(rows))
    if whole > count and rows.numel() >= LARGE:
        rows, given = rows.new_empty(whole, rows.shape[1]), rows
        rows[:count], rows[count:] = given, 0
    together = None if bias is None else bias.contiguous()  # the operator heeds the strides of a weight alone
    y: Tensor = torch.ops.mkldnn._linear_pointwise(rows.contiguous(), weight, together, "none", [], "")
    return y.resize_(*x.shape[:-1], y.shape[1])  # not a view, which could not be changed in place, as timm's BEiT does


class _Linear(torch.autograd.Function):
    """A frozen linear layer by oneDNN; its gradient is one too, so that it can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return _Linear.apply(outputs[0], ctx.saved_tensors[0].t(), None), None, None


KERNELS = Kernels(for_onednn())
