"""Before training: are this model's per-sample gradients really those of single records?"""

from __future__ import annotations

import torch
from torch import nn

from lalora_flwr.data.inputs import rows, to_device
from lalora_flwr.errors import ConfigError
from lalora_flwr.lora.adapter import adapter_parameters, factor_of, set_active
from lalora_flwr.lora.dropout import remove_dropout
from lalora_flwr.lora.per_sample import PerSampleGradients
from lalora_flwr.lora.schedule import BOTH
from lalora_flwr.models.base import BaseModel

RECORDS = 3
# Of the norm of a tensor's gradient. Between batch sizes float32 kernels differ by about 1e-6 and bfloat16 ones by up to
# 0.05; records that mix differ by their own size.
TOLERANCE, LOW_PRECISION_TOLERANCE = 1e-3, 0.15


def self_check(base: BaseModel, model: nn.Module, engine: PerSampleGradients) -> None:
    """Compare the gradients of three synthetic records, taken together, with each record's own plain gradient.

    Runs in training mode. Catches what breaks the unit of privacy: windows or tokens taken for records, layers that mix
    a batch, a wrong batch axis, an adapter that takes no part. B is moved off zero for the check, since at B = 0 the
    gradient of A is zero and says nothing. Parameters and modes are as before afterwards.

    Raises:
        ConfigError: naming the first tensor that differs, or why the gradients cannot be told.
    """
    saved = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    modes = {module: module.training for module in model.modules()}
    put_dropout_back = remove_dropout(model)
    try:
        model.train()
        wrong = _first_mismatch(base, model, engine)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"model.name = {base.name!r}: no record's gradient can be told: {error}") from None
    finally:
        put_dropout_back()
        with torch.no_grad():
            for name, p in adapter_parameters(model).items():
                p.copy_(saved[name])
        for module, mode in modes.items():
            module.training = mode
    if wrong:
        raise ConfigError(
            f"model.name = {base.name!r}: {wrong}: the gradient of a record changes with its batch; this model mixes records "
            "and cannot be trained with record-level privacy"
        )


def _first_mismatch(base: BaseModel, model: nn.Module, engine: PerSampleGradients) -> str | None:
    """Name of the first tensor whose per-sample gradients differ from those of single records."""
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    low = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    tolerance = LOW_PRECISION_TOLERANCE if low else TOLERANCE
    inputs, labels = base.synthetic_batch(RECORDS, generator)
    inputs, labels = to_device(inputs, device), labels.to(device)
    active = set_active(model, BOTH)
    with torch.no_grad():
        for name, p in active.items():
            if factor_of(name) == "B":
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    together = engine(RECORDS, lambda: base.losses(model, inputs, labels))
    for j in range(RECORDS):
        loss = base.losses(model, rows(inputs, slice(j, j + 1)), labels[j : j + 1]).sum()
        alone = torch.autograd.grad(loss, list(active.values()))
        for name, gradient in zip(active, alone, strict=True):
            difference, scale = float((together[name][j] - gradient).norm()), max(float(gradient.norm()), 1e-8)
            if not difference <= tolerance * scale:  # NaN compares as false
                return name
    return None
