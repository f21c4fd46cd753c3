"""One step's pass of the model as the operations that it is made of, found on tensors that hold no numbers.

A pass of the real engine over the real architecture runs on fake tensors, which have shapes and nothing else: no weights, no
memory, seconds also for a model of 7 billion parameters. What it would do and hold is written down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from lalora_flwr.adapter.form import Adapter
from lalora_flwr.adapter.slots import Mask
from lalora_flwr.data.inputs import Inputs
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.gradients.products import KERNELS
from lalora_flwr.models.base import BaseModel

LOOK = 16  # operations between two counts of what is alive


@dataclass(frozen=True)
class Like:
    """A tensor as an operation's argument: enough to make one like it."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of the memory that it covers; what is repeated by a stride of 0 counts once."""
        entries = 1
        for size, stride in zip(self.size, self.stride, strict=True):
            entries *= size if stride else 1
        return entries * self.dtype.itemsize


@dataclass(frozen=True)
class Operation:
    """One call of a kernel.

    Attributes:
        call: the operator.
        args, kwargs: its arguments, tensors as `Like`.
        flops: multiplications and additions of its matrix products.
        bytes: read and written.
    """

    call: Any
    args: Any = field(compare=False)
    kwargs: Any = field(compare=False)
    key: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Traced:
    """A pass.

    Attributes:
        operations: distinct ones, each with how often it is called.
        peak: the most bytes alive at once, above those before.
        records: of the pass.
    """

    operations: tuple[tuple[Operation, int], ...]
    peak: int
    records: int

    @property
    def flops(self) -> int:
        return sum(operation.flops * count for operation, count in self.operations)

    @property
    def bytes(self) -> int:
        return sum(operation.bytes * count for operation, count in self.operations)

    @property
    def calls(self) -> int:
        return sum(count for _, count in self.operations)


class _Recorder(TorchDispatchMode):
    """Writes down what is called, and how much memory is alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: dict[str, int] = {}
        self.operations: dict[str, Operation] = {}
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._held = 0
        self._since = 0

    def __torch_dispatch__(self, func: Any, types: Sequence[Any], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view and any(isinstance(value, Tensor) for value in tree_leaves(out)):  # others ask, and compute nothing
            like_args, like_kwargs = tree_map(_like, (args, kwargs))
            key = f"{func} {like_args} {like_kwargs}"
            if key not in self.operations:
                flops, moved = _flops(func, args, kwargs, out), _moved((args, kwargs, out))
                self.operations[key] = Operation(func, like_args, like_kwargs, key, flops, moved)
            self.counts[key] = self.counts.get(key, 0) + 1
            self._watch(out)
        return out

    def _watch(self, out: Any) -> None:
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
        self._since += 1
        held = sum(size for _, size in self._alive.values())
        if held > self.peak or self._since >= LOOK:  # the dead are counted out only where that can matter
            self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}  # type: ignore[no-untyped-call]
            self._since = 0
            self.peak = max(self.peak, sum(size for _, size in self._alive.values()))


def _like(value: object) -> object:
    return Like(tuple(value.shape), tuple(value.stride()), value.dtype) if isinstance(value, Tensor) else value


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    packet = func._overloadpacket
    if packet.__name__.endswith("_"):  # in place: counted as what it is otherwise
        packet = getattr(torch.ops.aten, packet.__name__.rstrip("_"), packet)
    count = flop_registry.get(packet)
    return int(count(*args, **kwargs, out_val=out)) if count else 0


def _moved(values: Any) -> int:
    return sum(like.bytes for like in map(_like, tree_leaves(values)) if isinstance(like, Like))


def traced(base: BaseModel, adapter: Adapter, engine: PerSampleGradients, active: Mask, made_up: tuple[Inputs, Tensor]) -> Traced:
    """The pass of one physical batch: forward, backward, each record's gradients.

    Args:
        base, adapter, engine: on any device, also ``meta``; their values do not matter and stay.
        active: slots that train.
        made_up: a batch of inputs and labels; only its shapes matter.
    """
    inputs, labels = made_up
    adapter.activate(active)
    adapter.model.train()
    device = adapter.device
    records = len(labels)

    def run() -> None:
        engine(records, lambda: adapter.losses(base, fake_inputs, fake_labels))

    with KERNELS.left_to_pytorch(), FakeTensorMode(allow_non_fake_inputs=True) as mode:  # whose operations are counted
        fake: Callable[[Tensor], Tensor] = lambda tensor: mode.from_tensor(tensor.to(device))  # noqa: E731
        fake_inputs: Inputs = {name: fake(value) for name, value in inputs.items()} if isinstance(inputs, dict) else fake(inputs)
        fake_labels = fake(labels)
        with _Recorder() as recorder:
            run()
    return Traced(tuple((recorder.operations[key], count) for key, count in recorder.counts.items()), recorder.peak, records)
