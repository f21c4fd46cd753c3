"""The inputs of a batch: one tensor of images, or the named tensors of a text batch; records lie along the first axis."""

from __future__ import annotations

import torch
from torch import Tensor

Inputs = Tensor | dict[str, Tensor]


def rows(inputs: Inputs, indices: Tensor | slice) -> Inputs:
    """Some records of a batch of inputs."""
    if isinstance(inputs, dict):
        return {name: value[indices] for name, value in inputs.items()}
    return inputs[indices]


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """The inputs on a device."""
    if isinstance(inputs, dict):
        return {name: value.to(device) for name, value in inputs.items()}
    return inputs.to(device)
