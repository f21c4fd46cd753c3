"""Before training: are this model's per-sample gradients really those of single records?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lalora_flwr.adapter.form import Adapter
from lalora_flwr.data.inputs import to_device
from lalora_flwr.gradients.dropout import remove_dropout
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.gradients.precision import full_precision
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.base import BaseModel

# Of the norm of the same tensor's gradient. Between batch sizes float32 kernels differ by about 1e-6 of it; records that mix
# differ by their own size.
TOLERANCE = 1e-3
# Of the largest norm that the tensor's gradient has in the batch: a gradient that is zero but for rounding, as that of
# the attention's queries in a text of one token, is not the same rounding twice.
ROUNDING = 1e-5
MOST_ROUNDING = 0.5  # of a gradient's norm: beyond it a step points elsewhere


def self_check(base: BaseModel, adapter: Adapter, engine: PerSampleGradients) -> None:
    """Compare the gradients of made-up records, taken together, with the plain gradient of each record alone, unpadded.

    Runs in training mode, in float32 or better whatever the base is kept in, on many short records and on a few up to the
    longest that training can meet. Catches what breaks the unit of privacy: windows or tokens taken for records, layers that
    mix a batch, a wrong batch axis, padding or a neighbour's length that shows, an adapter that takes no part. What
    starts at zero, as B does, is moved off it for the check: at B = 0 the gradient of A is zero and says nothing. Parameters
    and modes are as before afterwards. It costs about as much as a step on as many records.

    Raises:
        ConfigError: naming the first tensor that differs or whose gradient is zero, or why the gradients cannot be determined.
    """
    try:
        with _as_before(adapter), full_precision(adapter.model):
            fault = _first_fault(base, adapter, engine)
    except torch.OutOfMemoryError:
        fault = "too little memory for the check before training: the weights in float32 and a few of the longest records"
    except (RuntimeError, ValueError, LookupError) as error:
        fault = f"no record's gradient can be determined: {' '.join(str(error).split())}"
    if fault:
        raise ConfigError(f"model.name = {base.name!r}: {fault}")


def rounding(base: BaseModel, adapter: Adapter, engine: PerSampleGradients) -> float:
    """How far the gradients of made-up records in the base's own precision are from those in float32 with the same weights.

    Returns:
        The norm of the difference over the norm of the gradient, all tensors together, of the record for which it is largest;
        infinite if one of them is not finite.
    """
    generator, device, worst = torch.Generator().manual_seed(0), adapter.device, 0.0
    with _as_before(adapter):
        adapter.activate(adapter.trainable)
        adapter.stir(generator)
        for made_up in base.check_batches(generator):
            inputs, labels = to_device(made_up[0], device), made_up[1].to(device)
            found = engine(len(labels), lambda: adapter.losses(base, inputs, labels))  # noqa: B023
            with full_precision(adapter.model):
                wanted = engine(len(labels), lambda: adapter.losses(base, inputs, labels))  # noqa: B023
            for j in range(len(labels)):
                off = math.hypot(*(_norm(found[name][j] - wanted[name][j]) for name in wanted))
                size = math.hypot(*(_norm(wanted[name][j]) for name in wanted))
                worst = max(worst, off / size) if math.isfinite(off) and size else math.inf
    return worst


def check_precision(base: BaseModel, adapter: Adapter, engine: PerSampleGradients, dtype: str) -> float:
    """`rounding`, if training can bear it in the ``dtype`` that somebody chose.

    Privacy does not rest on it: each gradient is clipped and noised as it is.

    Raises:
        ConfigError: it is above `MOST_ROUNDING`.
    """
    found = rounding(base, adapter, engine)
    if not found <= MOST_ROUNDING:
        raise ConfigError(
            f"model.dtype = {dtype!r}: gradients of {base.name!r} are off by {found:.0%} of their norm, above "
            f"{MOST_ROUNDING:.0%}; take float32"
        )
    return found


@contextmanager
def _as_before(adapter: Adapter) -> Iterator[None]:
    """The model in training mode without dropout; afterwards parameters and modes are as before."""
    model = adapter.model
    saved = {name: p.detach().clone() for name, p in adapter.parameters.items()}
    modes = {module: module.training for module in model.modules()}
    put_dropout_back = remove_dropout(model)
    try:
        model.train()
        yield
    finally:
        put_dropout_back()
        with torch.no_grad():
            for name, p in adapter.parameters.items():
                p.copy_(saved[name])
        for module, mode in modes.items():
            module.training = mode


def _first_fault(base: BaseModel, adapter: Adapter, engine: PerSampleGradients) -> str | None:
    """What is wrong with the first tensor that is not as it must be; None if all are."""
    generator = torch.Generator().manual_seed(0)
    device = adapter.device
    active = adapter.activate(adapter.trainable)
    adapter.stir(generator)
    silent = dict.fromkeys(active)
    for made_up in base.check_batches(generator):
        inputs, labels = to_device(made_up[0], device), made_up[1].to(device)
        together = engine(len(labels), lambda: adapter.losses(base, inputs, labels))  # noqa: B023
        alone = []
        for j in range(len(labels)):
            loss = adapter.losses(base, *base.single(inputs, labels, j)).sum()
            alone.append(dict(zip(active, torch.autograd.grad(loss, list(active.values())), strict=True)))
        for name in active:
            sizes = [_norm(gradients[name]) for gradients in alone]
            for j, gradients in enumerate(alone):
                allowed = TOLERANCE * sizes[j] + ROUNDING * max(sizes)
                if not _norm(together[name][j] - gradients[name]) <= allowed:  # NaN compares as false
                    return (
                        f"{name}: the gradient of a record changes with its batch; this model mixes records and cannot be "
                        "trained with record-level privacy"
                    )
            if any(sizes):
                silent.pop(name, None)
    if silent:
        return (
            f"{next(iter(silent))}: its gradient is zero for every made-up record, so that nothing shows whether records mix; "
            "take published weights, or leave the layer out of lora.targets"
        )
    return None


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())
