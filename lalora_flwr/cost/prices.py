"""What an operation costs: measured on this machine, or computed from what a data sheet says of another one."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map

from lalora_flwr.cost.trace import Like, Operation, Traced
from lalora_flwr.gradients.products import KERNELS
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.malloc import keep_freed_memory

ENOUGH = 0.02  # seconds of measuring an operation
MOST_RUNS = 20
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
CACHE = 1 << 25  # bytes over which arguments take turns: in a pass, others come in between
MOST_COPIES = 12
SMALL = 1 << 16  # bytes up to which an operation without a matrix product costs its call alone
OVERHEAD = 8.0  # calls of a small kernel that Python and autograd take for each operation beside the kernel itself


class Prices(Protocol):
    """Seconds of operations."""

    @property
    def name(self) -> str:
        """What they are of."""

    def of(self, operation: Operation) -> float:
        """Of one call."""


@dataclass
class Here:
    """This machine: each distinct operation is run a few times on tensors of its shapes.

    Args:
        device: on which.
        clock: seconds.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    clock: Callable[[], float] = time.perf_counter
    name: str = "this machine"
    _known: dict[str, float] = field(default_factory=dict)
    _call: float = 0.0

    def __post_init__(self) -> None:
        keep_freed_memory()  # as a process that trains does

    def of(self, operation: Operation) -> float:
        if not operation.flops and operation.bytes <= SMALL:
            return (1 + OVERHEAD) * self._of_call()
        if operation.key not in self._known:
            self._known[operation.key] = self._measured(operation)
        return self._known[operation.key]

    def _of_call(self) -> float:
        if not self._call:
            one = torch.ones(64, device=self.device)
            self._call = self._fastest(lambda: torch.add(one, one))
        return self._call

    def _measured(self, operation: Operation) -> float:
        try:
            copies = min(MOST_COPIES, 1 + int(CACHE / max(1, operation.bytes)))
            made = itertools.cycle([tree_map(self._made, (operation.args, operation.kwargs)) for _ in range(copies)])

            frozen = operation.call in PRODUCTS and KERNELS.take(*next(made)[0][-2:])  # as most large ones are

            def run() -> None:
                args, kwargs = next(made)
                if frozen:
                    KERNELS.product(args[-2], args[-1].t())
                else:
                    operation.call(*args, **kwargs)

            return self._fastest(run) + OVERHEAD * self._of_call()
        except Exception:  # an operator whose made-up arguments do not fit each other
            return (1 + OVERHEAD) * self._of_call() + operation.bytes / 1e10

    def _made(self, value: object) -> object:
        if isinstance(value, torch.device):
            return self.device
        if not isinstance(value, Like):
            return value
        made = torch.empty_strided(value.size, value.stride, dtype=value.dtype, device=self.device)
        return made.uniform_(-1, 1) if made.is_floating_point() and 0 not in value.stride else made.zero_()

    def _fastest(self, run: Callable[[], Any]) -> float:
        """The fastest run: what else the machine does is no part of the price."""
        best, begun = float("inf"), self.clock()
        with torch.no_grad():
            for _ in range(MOST_RUNS):
                before = self.clock()
                run()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                best = min(best, self.clock() - before)
                if self.clock() - begun > ENOUGH:
                    break
        return best


@dataclass(frozen=True)
class Hardware:
    """A device by its data sheet. An estimate: nothing was measured on it.

    Attributes:
        name: as ``lalora plan --hardware`` has it.
        flops: peak of dense matrix products a second, by bytes of a number.
        bandwidth: of its memory, bytes a second.
        memory: bytes.
        call: seconds in which Python and autograd start a kernel.
    """

    name: str
    flops: dict[int, float]
    bandwidth: float
    memory: float
    call: float = 15e-6

    EFFICIENT = 0.5  # of the peak, which large products reach
    STREAMED = 0.7  # of the bandwidth

    def of(self, operation: Operation) -> float:
        width = min((value.dtype.itemsize for value in _tensors(operation) if value.dtype.is_floating_point), default=4)
        computing = operation.flops / (self.EFFICIENT * self.flops[2 if width <= 2 else 4])
        return max(self.call, computing, operation.bytes / (self.STREAMED * self.bandwidth))


def _tensors(operation: Operation) -> list[Like]:
    found: list[Like] = []
    tree_map(lambda value: found.append(value) if isinstance(value, Like) else None, (operation.args, operation.kwargs))
    return found


# Dense peaks without sparsity: bfloat16 on tensor units, float32 on the others, as this package computes.
KNOWN = {
    known.name: known
    for known in (
        Hardware("h100", {2: 989e12, 4: 67e12}, 3.35e12, 80e9),
        Hardware("a100", {2: 312e12, 4: 19.5e12}, 2.04e12, 80e9),
        Hardware("l4", {2: 121e12, 4: 30e12}, 0.3e12, 24e9),
    )
}


def prices_of(name: str) -> Prices:
    """The prices of ``this-machine`` or of known hardware.

    Raises:
        ConfigError: unknown.
    """
    if name in ("", "this-machine"):
        return Here()
    if name not in KNOWN:
        raise ConfigError(f"--hardware {name}: must be one of this-machine, {', '.join(KNOWN)}")
    return KNOWN[name]


def seconds(traced: Traced, prices: Prices) -> float:
    """Of one pass."""
    return sum(count * prices.of(operation) for operation, count in traced.operations)
