"""Before training: are this model's per-sample gradients really those of single records?"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lalora_flwr.errors import ConfigError
from lalora_flwr.lora.adapter import adapter_parameters, factor_of, set_active
from lalora_flwr.lora.per_sample import PerSampleGradients
from lalora_flwr.lora.schedule import BOTH
from lalora_flwr.models.base import BaseModel

RECORDS = 3
TOLERANCE = 1e-3  # relative to the largest gradient of the tensor; float32 kernels differ by about 1e-6 between batch sizes


def self_check(base: BaseModel, model: nn.Module, engine: PerSampleGradients) -> None:
    """Compare the gradients of three synthetic records, taken together, with each record's own plain gradient.

    Catches what breaks the unit of privacy: windows or tokens taken for records, layers that mix a batch (BatchNorm),
    a wrong batch axis. B is moved off zero for the check, since at B = 0 the gradient of A is zero and says nothing.

    Raises:
        ConfigError: naming the first tensor that differs.
    """
    parameters = adapter_parameters(model)
    saved = {name: p.detach().clone() for name, p in parameters.items()}
    modes = {module: module.training for module in model.modules()}
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    inputs = torch.randn(RECORDS, *base.input_shape, generator=generator).to(device)
    labels = torch.arange(RECORDS, device=device) % base.num_classes
    try:
        for module in model.modules():  # dropout off, since it draws; batch statistics as in training
            module.training = modes[module] and isinstance(module, _BatchNorm)
        with torch.no_grad():
            for name, p in parameters.items():
                if factor_of(name) == "B":
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
        active = set_active(model, BOTH)
        together = engine(RECORDS, lambda: base.losses(model, inputs, labels))
        for j in range(RECORDS):
            loss = base.losses(model, inputs[j : j + 1], labels[j : j + 1]).sum()
            alone = torch.autograd.grad(loss, list(active.values()))
            for (name, _), gradient in zip(active.items(), alone, strict=True):
                scale = max(float(gradient.abs().max()), 1e-8)
                if float((together[name][j] - gradient).abs().max()) > TOLERANCE * scale:
                    raise ConfigError(
                        f"model.name = {base.name!r}: {name}: the gradient of a record changes with its batch; this model "
                        "mixes records and cannot be trained with record-level privacy"
                    )
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(saved[name])
        for module, mode in modes.items():
            module.training = mode
